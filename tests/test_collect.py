"""Moments are right, cheap to state, and the model comes out as it went in."""

import pytest
import torch

from fasc.statistics.collect import collect
from fasc.statistics.objective import summed_nll
from fasc.statistics.moments import Need, Statistics
from fasc.model.options import LayersConfig
from fasc.statistics.options import CalibrationConfig
from fasc.errors import CorpusError, ModelError, NonFiniteError, StatisticsError
from fasc.methods import METHODS
from fasc.model.groups import find_groups
from tests.conftest import CONFIGS, PARALLEL, tiny_model
from tests.reference import covariance, moments_by_hand

EVERYTHING = frozenset().union(*(method.needs for method in METHODS.values()))
EXPECTED_KINDS = {
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


def calibration(**options):
    return CalibrationConfig(batch_tokens=160, **options)


def test_groups_are_the_layers_that_read_the_same_tensor(architecture):
    groups = find_groups(tiny_model(architecture), LayersConfig())
    expected = EXPECTED_KINDS.get(architecture, ["q_proj+k_proj+v_proj", "o_proj", "gate_proj+up_proj", "down_proj"])
    assert [group.kind for group in groups] == expected * 2
    assert [group.block for group in groups] == [0] * 4 + [1] * 4


def test_group_names_say_the_parent_once(model):
    names = [group.name for group in find_groups(model, LayersConfig())]
    assert names[0] == "model.layers.0.self_attn.q_proj+k_proj+v_proj"
    assert names[3] == "model.layers.0.mlp.down_proj"


def test_layers_can_be_chosen_and_an_empty_choice_is_an_error(model):
    chosen = find_groups(model, LayersConfig(include=("*.mlp.*",), exclude=("*.1.*",)))
    assert [group.kind for group in chosen] == ["gate_proj+up_proj", "down_proj"]
    with pytest.raises(ModelError, match="no layer to compress"):
        find_groups(model, LayersConfig(include=("*.experts.*",)))


@pytest.mark.parametrize("architecture", [*CONFIGS, *PARALLEL])
def test_moments_equal_those_of_kept_activations_and_gradients(architecture, tokens):
    model = tiny_model(architecture)
    statistics = collect(model, tokens, EVERYTHING, calibration=calibration())
    names = [layer.name for group in statistics.groups.values() for layer in group.group.layers]
    x, h = moments_by_hand(model, tokens, names)
    for name, group in statistics.groups.items():
        members = [layer.name for layer in group.group.layers]
        inputs = x[members[0]]
        assert group.tokens == tokens.numel()
        close(group.input.mean, inputs.mean(0))
        close(group.input.matrix, covariance(inputs))
        for unit, layers in {name: members, **{member: [member] for member in members}}.items():
            moment = group.gradients[unit]
            expected = _gradient(model, h, layers, moment.side)
            close(moment.covariance.matrix, covariance(expected))
            if moment.cross is not None:
                close(moment.cross, covariance(inputs, expected))


def _gradient(model, h, layers, side):
    from fasc.model.layers import oriented_weight

    if side == "output":
        return torch.cat([h[layer] for layer in layers], dim=1)
    return sum(h[layer] @ oriented_weight(model.get_submodule(layer)).detach().double() for layer in layers)


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()) + 1e-9)


def test_a_moment_lies_on_the_smaller_side(model, tokens):
    statistics = collect(model, tokens, EVERYTHING, calibration=calibration())
    sides = {name.split(".")[-1]: group.gradients[name].side for name, group in statistics.groups.items()}
    assert sides == {
        "q_proj+k_proj+v_proj": "input",
        "o_proj": "input",
        "gate_proj+up_proj": "input",
        "down_proj": "output",
    }


def test_the_cross_moment_is_the_transposed_weight_gradient(tokens):
    """E[x hᵀ] is the mean of the weight's gradient, transposed: the labels are not shifted twice."""
    model = tiny_model()
    name = "model.layers.1.mlp.down_proj"
    statistics = collect(model, tokens, EVERYTHING, calibration=calibration())
    group = statistics.groups[name]
    raw = group.gradients[name].cross.double() + torch.outer(
        group.input.mean.double(), group.gradients[name].covariance.mean.double()
    )
    model(input_ids=tokens, labels=tokens, num_items_in_batch=1).loss.backward()
    close(raw.mT * group.tokens, model.get_submodule(name).weight.grad.double())


@pytest.mark.parametrize("options", [{"batch_tokens": 20}, {"batch_tokens": 100_000}, {"gradient_checkpointing": True}])
def test_batches_and_checkpointing_do_not_change_the_moments(tokens, options, architecture):
    plain = collect(tiny_model(architecture), tokens, EVERYTHING, calibration=calibration())
    other = collect(
        tiny_model(architecture), tokens, EVERYTHING, calibration=CalibrationConfig(**({"batch_tokens": 160} | options))
    )
    assert_same(plain, other)


def test_in_mixed_precision_only_the_model_is_rounded(tokens, architecture):
    """Sums stay in float32: what the first layers read was not rounded, and its covariance is the same to the last digit."""
    plain = collect(tiny_model(architecture), tokens, EVERYTHING, calibration=calibration())
    mixed = collect(tiny_model(architecture), tokens, EVERYTHING, calibration=calibration(mixed_precision=True))
    first = next(iter(plain.groups))
    assert torch.equal(mixed.groups[first].input.matrix, plain.groups[first].input.matrix)
    for name, group in plain.groups.items():
        pairs = [(mixed.groups[name].input.matrix, group.input.matrix)]
        pairs += [(mixed.groups[name].gradients[u].covariance.matrix, g.covariance.matrix) for u, g in group.gradients.items()]
        for found, expected in pairs:
            assert found.dtype == torch.float32
            assert not torch.equal(found, expected) or name == first
            assert float((found - expected).norm()) < 0.15 * float(expected.norm()), name


def assert_same(a, b):
    assert list(a.groups) == list(b.groups)
    for name, group in a.groups.items():
        close(b.groups[name].input.matrix, group.input.matrix.double())
        for unit, moment in group.gradients.items():
            close(b.groups[name].gradients[unit].covariance.matrix, moment.covariance.matrix.double())


@pytest.mark.parametrize("labels", ["corpus", "sampled"])
def test_padding_is_excluded(tokens, labels):
    short = tokens[:8, :12]
    padded = torch.cat([short, torch.full((8, 5), 2)], dim=1)
    mask = torch.cat([torch.ones(8, 12), torch.zeros(8, 5)], dim=1).long()
    needs = METHODS["fasc"].needs if labels == "corpus" else METHODS["svd"].needs
    plain = collect(tiny_model(), short, needs, calibration=calibration(labels=labels))
    with_padding = collect(tiny_model(), padded, needs, calibration=calibration(labels=labels), mask=mask)
    assert_same(plain, with_padding)
    assert next(iter(with_padding.groups.values())).tokens == 96


def test_the_model_comes_out_as_it_went_in(tokens):
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    parameter = model.transformer.h[1].mlp.c_fc.weight
    parameter.requires_grad_(False)
    parameter.grad = torch.ones_like(parameter)
    calls = []
    handle = model.transformer.h[0].register_forward_hook(lambda *_: calls.append(1) and None)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    collect(model, tokens, EVERYTHING, calibration=calibration(labels="sampled", gradient_checkpointing=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert all(p.grad is None for p in model.parameters() if p is not parameter)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())
    assert hooks == 1
    assert calls
    assert "forward" not in vars(model.transformer.h[0])
    handle.remove()


def test_our_hooks_are_removed_when_the_body_raises(tokens):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="calibration sequences 0-7"):
        collect(model, tokens, EVERYTHING, calibration=calibration())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_no_backward_pass_runs_unless_a_method_asks_for_gradients(tokens, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("backward ran"))
    statistics = collect(tiny_model(), tokens, METHODS["svd"].needs, calibration=calibration())
    assert not next(iter(statistics.groups.values())).gradients
    with pytest.raises(StatisticsError, match="gradient per group"):
        statistics.require(METHODS["fasc"].needs)


def test_bfloat16_models_give_float32_moments(tokens):
    exact = collect(tiny_model(), tokens, METHODS["fasc"].needs, calibration=calibration())
    rough = collect(tiny_model(dtype=torch.bfloat16), tokens, METHODS["fasc"].needs, calibration=calibration())
    for name, group in rough.groups.items():
        assert group.input.matrix.dtype == torch.float32
        difference = (group.input.matrix - exact.groups[name].input.matrix).norm() / exact.groups[name].input.matrix.norm()
        assert difference < 0.05


def test_sampled_labels_follow_the_model_and_the_seed():
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).expand(1, 4000, 3)
    tokens = torch.zeros(1, 4000, dtype=torch.long)
    loss = summed_nll(logits, tokens, None, "sampled", torch.Generator().manual_seed(0)) / 4000
    entropy = -(0.7 * torch.tensor(0.7).log() + 0.2 * torch.tensor(0.2).log() + 0.1 * torch.tensor(0.1).log())
    assert float(loss) == pytest.approx(float(entropy), rel=0.05)
    again = summed_nll(logits, tokens, None, "sampled", torch.Generator().manual_seed(0)) / 4000
    assert torch.equal(loss, again)
    assert not torch.equal(loss, summed_nll(logits, tokens, None, "sampled", torch.Generator().manual_seed(1)) / 4000)


def test_the_loss_is_a_sum_so_that_gradients_do_not_depend_on_the_batch():
    logits = torch.randn(6, 9, 5)
    tokens = torch.randint(5, (6, 9))
    whole = summed_nll(logits, tokens, None, "corpus", None)
    parts = sum(summed_nll(logits[i : i + 2], tokens[i : i + 2], None, "corpus", None) for i in (0, 2, 4))
    torch.testing.assert_close(whole, parts)


def test_statistics_survive_the_disk(tokens, tmp_path):
    statistics = collect(tiny_model(), tokens, EVERYTHING, calibration=calibration())
    loaded = Statistics.load(statistics.save(tmp_path / "statistics.safetensors"))
    assert loaded.meta == statistics.meta
    for name, group in statistics.groups.items():
        other = loaded.groups[name]
        assert other.group == group.group
        assert torch.equal(other.input.matrix, group.input.matrix)
        assert set(other.gradients) == set(group.gradients)
        for unit, moment in group.gradients.items():
            assert other.gradients[unit].side == moment.side
            assert torch.equal(other.gradients[unit].covariance.matrix, moment.covariance.matrix)
            assert (other.gradients[unit].cross is None) == (moment.cross is None)
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.safetensors"]
    with pytest.raises(StatisticsError, match="another model"):
        loaded.require_model("0" * 64)


def test_damaged_or_missing_statistics_are_refused(tmp_path):
    file = tmp_path / "statistics.safetensors"
    with pytest.raises(StatisticsError, match="does not exist"):
        Statistics.load(file)
    file.write_bytes(b"not a safetensors file")
    with pytest.raises(StatisticsError, match="damaged"):
        Statistics.load(file)


def test_no_tokens_is_an_error():
    with pytest.raises(CorpusError, match="no calibration tokens"):
        collect(tiny_model(), torch.zeros(0, 8, dtype=torch.long), METHODS["svd"].needs)


def test_needs_name_a_moment_and_a_scope():
    assert METHODS["two-sided"].needs == {Need("input", "group"), Need("gradient", "layer")}
    assert len(CONFIGS) == 8


def test_extra_moments_are_those_of_their_definitions(model, tokens):
    """E|x|, E[(g⊙x)(g⊙x)ᵀ], and the row sums of the squared weight gradient of each sequence, from autograd itself."""
    needs = frozenset({Need("input", "group"), *(Need(name, "group") for name in ("magnitude", "product", "rows"))})
    statistics = collect(model, tokens, needs, calibration=CalibrationConfig(batch_tokens=64))
    name = "model.layers.1.mlp.down_proj"
    found = statistics.groups[name].extras
    x, h = (parts[name] for parts in moments_by_hand(model, tokens, [name]))
    weight = model.get_submodule(name).weight.detach().double()
    product = (h @ weight) * x
    torch.testing.assert_close(found["magnitude"].double(), x.abs().mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["product"].double(), product.mT @ product / len(x), rtol=1e-3, atol=1e-6)
    rows = torch.zeros(weight.shape[0], dtype=torch.float64)
    for sequence in tokens:
        model.zero_grad()
        logits = model(input_ids=sequence[None], use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[0, :-1], sequence[1:], reduction="sum").backward()
        rows += model.get_submodule(name).weight.grad.double().square().sum(1) / len(tokens)
    torch.testing.assert_close(found[f"rows/{name}"].double(), rows, rtol=1e-3, atol=1e-7)


def test_extra_moments_survive_the_file_and_padding_changes_nothing(model, tokens, tmp_path):
    needs = frozenset({Need("input", "group"), *(Need(name, "group") for name in ("magnitude", "product", "rows", "sequences"))})
    plain = collect(model, tokens, needs)
    padded = torch.cat([tokens, torch.full((len(tokens), 4), 2)], dim=1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros(len(tokens), 4, dtype=torch.long)], dim=1)
    masked = collect(model, padded, needs, mask=mask)
    loaded = Statistics.load(plain.save(tmp_path / "s.safetensors"))
    assert torch.equal(loaded.tokens, tokens)
    for name, group in plain.groups.items():
        assert set(loaded.groups[name].extras) == set(group.extras)
        for key, value in group.extras.items():
            assert torch.equal(loaded.groups[name].extras[key], value)
            torch.testing.assert_close(masked.groups[name].extras[key], value, rtol=1e-3, atol=1e-4)
