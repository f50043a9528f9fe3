"""Compressed models: exact at full rank, sharing, round trips, ordinary use."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import parametrize, prune
from transformers import AutoModelForCausalLM, LlamaConfig

from fasc import pipeline
from fasc.planning.plan import RankPlan
from fasc.statistics.collect import collect
from fasc.compression.compress import compress
from fasc.compression.merge import merge
from fasc.model.options import LayersConfig
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.recipe import Recipe
from fasc.errors import ModelError, StatisticsError, StorageError
from fasc.methods import METHODS
from fasc.model import lowrank
from fasc.model.checkpoint import CheckpointNotes, save_checkpoint
from fasc.model.load import LoadedModel, load_model, model_fingerprint
from fasc.layouts.lowrank import LowRankLinear, PivotColumns, PivotRows, SharedProjection, by_all_threads, in_order, link_group
from tests.conftest import CONFIGS, tiny_model

EVERYTHING = frozenset().union(*(method.needs for method in METHODS.values()))


@pytest.fixture(scope="module")
def statistics(tokens):
    cache = {}

    def measure(architecture="llama"):
        if architecture not in cache:
            cache[architecture] = collect(tiny_model(architecture), tokens, EVERYTHING)
        return cache[architecture]

    return measure


def full_rank_plan(model, method):
    """Factors at every direction the method has: a plan no budget would make, and the strictest test of the modules."""
    from dataclasses import replace

    plan = pipeline.plan(model, method, BudgetConfig(rank_fraction=0.5))
    scope = METHODS[method]
    units = []
    for unit in plan.units:
        on_inputs = method in ("svd", "fasc-eq6", "grad-weighted", "fisher-diag")  # d_in directions, whatever the layer's rank
        full = unit.d_in if on_inputs or unit.d_in <= unit.d_out else unit.d_out
        units.append(replace(unit, rank=full, layout="factors" if len(unit.layers) == 1 else "shared"))
    assert scope.name == method
    return replace(plan, units=tuple(units))


def compressed(statistics, architecture="llama", method="fasc", fraction=0.5, **options):
    model = tiny_model(architecture)
    chosen = MethodConfig(name=method, **options)
    plan = pipeline.plan(model, chosen, BudgetConfig(rank_fraction=fraction))
    done = compress(model, statistics(architecture), plan, chosen)
    return model, done


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("method", sorted(METHODS))
def test_at_full_rank_the_logits_are_the_dense_models(statistics, tokens, method, architecture):
    model = tiny_model(architecture)
    dense = logits(model, tokens)
    compress(model, statistics(architecture), full_rank_plan(model, method))
    assert sum(isinstance(m, LowRankLinear) for m in model.modules()) >= 8
    assert (logits(model, tokens) - dense).abs().max() < 1e-3


def test_rank_fraction_one_keeps_every_layer_as_it_is(statistics, tokens):
    model, plan = compressed(statistics, fraction=1)
    assert torch.equal(logits(model, tokens), logits(tiny_model(), tokens))
    assert plan.totals["param_fraction"] == 1
    assert plan.predicted_loss == 0


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_layer_outputs_keep_their_mean(statistics, tokens, method):
    """The whole point of the bias: compress one group alone and its mean output on the calibration text is unchanged."""
    dense, model = tiny_model(), tiny_model()
    plan = pipeline.plan(model, method, BudgetConfig(rank_fraction=0.25), layers=LayersConfig(include=("*.1.mlp.down_proj",)))
    compress(model, statistics(), plan)
    outputs = []
    for one in (dense, model):
        found = []
        handle = one.model.layers[1].mlp.down_proj.register_forward_hook(lambda _m, _a, y, found=found: found.append(y))
        logits(one, tokens)
        handle.remove()
        outputs.append(found[0])
    torch.testing.assert_close(outputs[1].mean((0, 1)), outputs[0].mean((0, 1)), rtol=0, atol=1e-4)
    assert (outputs[1] - outputs[0]).abs().max() > 1e-2


def test_the_forecast_is_half_the_dropped_energy_and_grows_as_ranks_fall(statistics):
    losses = [compressed(statistics, fraction=f)[1].predicted_loss for f in (0.25, 0.5, 0.75)]
    assert losses[0] > losses[1] > losses[2] > 0
    assert compressed(statistics, method="svd", fraction=0.5)[1].predicted_loss > losses[1], (
        "known of every method, least of fasc"
    )


@pytest.mark.parametrize("layouts", [("shared", "factors"), ("shared", "pivoted"), ("shared", "pivoted-columns")])
def test_a_group_projects_once_per_forward(statistics, tokens, monkeypatch, layouts):
    model, _ = compressed(statistics, layouts=layouts)
    calls = []
    expected = {"factors": SharedProjection, "pivoted": PivotRows, "pivoted-columns": PivotColumns}[layouts[-1]]
    for kind in {SharedProjection, expected}:
        for name in {"project", "of_vector", "write"} & vars(kind).keys():
            plain = getattr(kind, name)
            monkeypatch.setattr(kind, name, lambda self, *args, plain=plain: (calls.append(self), plain(self, *args))[1])
    projections = [m for m in model.modules() if isinstance(m, SharedProjection)]
    assert {type(m) for m in projections} == {expected}
    assert {m.readers for m in projections} == {1, 2, 3}
    logits(model, tokens)
    assert len(calls) == len(projections) == len({id(one) for one in calls})
    assert all(m._input is None and m._output is None for m in projections), "nothing is kept between forwards"


def test_a_shared_projection_is_right_in_any_order_of_calls():
    torch.manual_seed(0)
    layers = [LowRankLinear(6, d, 3) for d in (4, 5, 2)]
    link_group(layers)
    for layer in layers:
        layer.requires_grad_(False)
    a, b = torch.randn(7, 6), torch.randn(7, 6)

    def slow(layer, x):
        return x @ layer.weight.mT + layer.bias

    for layer, x in [(0, a), (0, b), (1, a), (2, b), (1, b), (0, a), (2, a), (1, a), (0, b)]:
        torch.testing.assert_close(layers[layer](x), slow(layers[layer], x))


def test_a_projection_in_training_sees_its_own_updates():
    layers = [LowRankLinear(6, 4, 3), LowRankLinear(6, 4, 3)]
    link_group(layers)
    x = torch.randn(2, 6)
    layers[0](x)
    with torch.no_grad():
        layers[0].down.weight.mul_(2)
    torch.testing.assert_close(layers[1](x), x @ layers[1].weight.mT + layers[1].bias)


def test_the_gradient_of_columns_in_order_is_that_of_indexing():
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(7, generator=generator).to(torch.int32)
    columns = torch.randn(3, 7, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.equal(in_order(columns, order), columns[:, order.long()])
    assert torch.autograd.gradcheck(in_order, (columns, order))
    with torch.no_grad():
        assert torch.equal(in_order(columns, order), columns[:, order.long()])


def test_copies_do_not_share_weights(statistics, tokens):
    model, _ = compressed(statistics)
    twin = copy.deepcopy(model)
    before = logits(model, tokens)
    assert torch.equal(logits(twin, tokens), before)
    with torch.no_grad():
        twin.model.layers[0].self_attn.q_proj.down.weight.zero_()
    assert torch.equal(logits(model, tokens), before)
    assert not torch.equal(logits(twin, tokens), before)
    k_proj = twin.model.layers[0].self_attn.k_proj
    assert k_proj._owner[0] is twin.model.layers[0].self_attn.q_proj


def test_generation_with_a_cache_and_a_batch_equals_one_without(statistics, tokens, architecture):
    model, _ = compressed(statistics, architecture)
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 2,
        "attention_mask": torch.ones(3, 8, dtype=torch.long),
    }
    cached = model.generate(tokens[:3, :8], use_cache=True, **options)
    plain = model.generate(tokens[:3, :8], use_cache=False, **options)
    assert torch.equal(cached, plain)
    alone = model.generate(tokens[1:2, :8], use_cache=True, **(options | {"attention_mask": torch.ones(1, 8, dtype=torch.long)}))
    assert torch.equal(alone[0], cached[1])


def test_it_compiles_into_one_graph(statistics, tokens):
    model, _ = compressed(statistics)
    model.requires_grad_(False)
    expected = logits(model, tokens)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(compiled(input_ids=tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_models_are_compressed_in_their_own_precision(statistics, tokens):
    model = tiny_model(dtype=torch.bfloat16)
    plan = pipeline.plan(model, "fasc", BudgetConfig(rank_fraction=0.5))
    compress(model, collect(model, tokens, METHODS["fasc"].needs), plan)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact, _ = compressed(statistics)
    difference = (logits(model, tokens).float() - logits(exact, tokens)).norm() / logits(exact, tokens).norm()
    assert difference < 0.1


def test_no_unit_is_stored_above_its_dense_size(statistics):
    for fraction in (0.3, 0.5, 0.75, 0.99):
        model, plan = compressed(statistics, fraction=fraction)
        orders = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(".order"))
        assert sum(p.numel() for p in model.parameters()) + orders == plan.totals["parameters"]
        assert all(unit.parameters <= unit.dense_parameters for unit in plan.units)
        assert {unit.layout for unit in plan.units} <= {"pivoted", "pivoted-columns", "dense", "factors", "shared"}


def test_a_rank_that_saves_nothing_can_be_had_as_a_dense_product(statistics, tokens):
    """For tables by rank: `merged` stores it as one dense matrix, and the model computes the same."""
    options = {"layouts": ("factors", "shared", "merged")}
    model, plan = compressed(statistics, fraction=0.5, **options)
    assert {unit.layout for unit in plan.units} >= {"merged"}
    assert all(unit.parameters <= unit.dense_parameters + unit.d_out for unit in plan.units)
    pivoted, _ = compressed(statistics, fraction=0.5)
    torch.testing.assert_close(logits(model, tokens), logits(pivoted, tokens), rtol=0, atol=1e-4)


def test_rank_fractions_are_what_they_say(model):
    plan = pipeline.plan(model, "fasc", BudgetConfig(rank_fraction=0.5))
    ranks = {unit.unit.rpartition(".")[2]: unit.rank for unit in plan.units}
    assert ranks == {"q_proj+k_proj+v_proj": 16, "o_proj": 16, "gate_proj+up_proj": 16, "down_proj": 16}
    per_layer = pipeline.plan(model, "whitened", BudgetConfig(rank_fraction=0.5))
    assert {u.unit.rpartition(".")[2]: u.rank for u in per_layer.units}["k_proj"] == 8
    assert plan.totals["rank_fraction"] == pytest.approx(0.5)
    assert RankPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def write(model, tokenizer, folder, plan):
    save_checkpoint(model, tokenizer, folder, CheckpointNotes({"a": 1}, {"versions": {}}, plan.to_dict(), "card"))


@pytest.mark.parametrize("method", ["fasc", "svd", "two-sided"])
def test_a_new_process_gives_identical_logits(statistics, tokens, tokenizer, tmp_path, method, architecture):
    model, plan = compressed(statistics, architecture, method, fraction=0.6)
    write(model, tokenizer, tmp_path / "out", plan)
    expected = logits(model, tokens)
    if method == "fasc" and architecture in ("llama", "gpt2"):  # a new process is slow: once for each kind of layer
        save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
        script = (
            "import sys, torch, fasc\n"
            "from transformers import AutoModelForCausalLM\n"
            "from safetensors.torch import load_file, save_file\n"
            "folder = sys.argv[1]\n"
            "model = AutoModelForCausalLM.from_pretrained(folder + '/out').eval()\n"
            "tokens = load_file(folder + '/tokens.safetensors')['tokens']\n"
            "with torch.no_grad():\n"
            "    save_file({'logits': model(input_ids=tokens).logits}, folder + '/logits.safetensors')\n"
        )
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True)
        found = load_file(tmp_path / "logits.safetensors")["logits"]
    else:
        found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), tokens)
    assert torch.equal(found, expected)


def test_the_folder_holds_safetensors_and_how_it_was_made_and_no_pickle(statistics, tokenizer, tmp_path):
    model, plan = compressed(statistics)
    write(model, tokenizer, tmp_path / "out", plan)
    files = {file.name for file in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "fasc_recipe.toml",
        "fasc_provenance.json",
        "fasc_plan.json",
        "README.md",
    } <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fasc"
    assert "auto_map" not in config


def test_tied_embeddings_stay_tied(statistics, tokenizer, tmp_path):
    model, plan = compressed(statistics)
    write(model, tokenizer, tmp_path / "out", plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_a_loaded_checkpoint_can_be_saved_again(statistics, tokens, tokenizer, tmp_path):
    model, plan = compressed(statistics)
    write(model, tokenizer, tmp_path / "one", plan)
    AutoModelForCausalLM.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two").eval()
    assert torch.equal(logits(again, tokens), logits(model, tokens))


def test_a_checkpoint_loads_in_another_precision(statistics, tokenizer, tmp_path):
    model, plan = compressed(statistics)
    write(model, tokenizer, tmp_path / "out", plan)
    loaded = load_model(tmp_path / "out", dtype="bfloat16", device="cpu").model
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_merged_checkpoints_are_ordinary_ones(statistics, tokens, tmp_path, architecture):
    model, _ = compressed(statistics, architecture, "fasc", fraction=0.5)
    before = logits(model, tokens)
    folded = merge(model, statistics(architecture), 1e-6)
    merged = logits(model, tokens)
    model.save_pretrained(tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    script = (
        "import sys\nfrom transformers import AutoModelForCausalLM\n"
        "m, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\nassert 'fasc' not in sys.modules\n"
    )
    if architecture == "llama":
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "merged")], check=True, capture_output=True)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(again, tokens), merged)
    assert not any(isinstance(m, LowRankLinear) for m in again.modules())
    if architecture in ("llama", "gpt2"):  # every layer has, or can be given, a bias
        assert not folded
        torch.testing.assert_close(merged, before, rtol=0, atol=1e-4)
    else:
        assert folded


def test_a_folded_bias_is_better_than_a_dropped_one(statistics, tokens):
    model, _ = compressed(statistics, "mistral")
    expected = logits(model, tokens)
    dropped = copy.deepcopy(model)
    for module in dropped.modules():
        if isinstance(module, LowRankLinear):
            module.up.bias.data.zero_()
    merge(model, statistics("mistral"), 1e-6)
    assert (logits(model, tokens) - expected).norm() < 0.9 * (logits(dropped, tokens) - expected).norm()


def test_recipe_and_weights_that_do_not_fit_are_refused(statistics, tokenizer, tmp_path):
    model, plan = compressed(statistics)
    folder = tmp_path / "out"
    write(model, tokenizer, folder, plan)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["units"][0]["rank"] = 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"rank 5 for `model.layers.0.self_attn.q_proj`, the weights hold rank 16"):
        load_model(folder)
    config["quantization_config"]["format"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load_model(folder)


def test_missing_and_truncated_weights_are_refused(statistics, tokenizer, tmp_path, model_folder):
    import shutil

    for name in ("dense", "low-rank"):
        folder = tmp_path / name
        if name == "dense":
            shutil.copytree(model_folder, folder)
        else:
            model, plan = compressed(statistics)
            write(model, tokenizer, folder, plan)
        file = folder / "model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ModelError):
            load_model(folder)
        file.unlink()
        with pytest.raises(ModelError):
            load_model(folder)


def test_absent_tensors_are_refused_and_not_invented(tmp_path, model_folder):
    import shutil

    shutil.copytree(model_folder, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights are missing, the first is `model.layers.1.mlp.up_proj.weight`"):
        load_model(tmp_path / "m")


def test_statistics_of_other_layers_are_refused(statistics):
    model = tiny_model()
    plan = pipeline.plan(model, "fasc", BudgetConfig(), layers=LayersConfig(include=("*.q_proj",)))
    with pytest.raises(StatisticsError, match="no group"):
        compress(model, statistics(), plan)


def test_an_existing_folder_survives_unless_it_may_be_replaced(statistics, tokenizer, tmp_path):
    loaded = LoadedModel(tiny_model(), tokenizer)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    recipe = Recipe()
    with pytest.raises(StorageError, match="already exists"):
        pipeline.compress_and_save(loaded, statistics(), recipe, out)
    assert (out / "precious.txt").read_text() == "mine"
    pipeline.compress_and_save(LoadedModel(tiny_model(), tokenizer), statistics(), recipe, out, overwrite=True)
    assert (out / "model.safetensors").is_file()
    assert not (out / "precious.txt").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_the_fingerprint_is_of_the_weights(model):
    first = model_fingerprint(model)
    assert model_fingerprint(tiny_model()) == first
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    assert model_fingerprint(model) != first


@pytest.fixture
def four_threads(monkeypatch):
    """On a machine where dividing the rows among the threads is faster for every number of tokens."""
    everything = frozenset({lowrank._ONE, lowrank._FEWEST, lowrank._FEW}) if torch.backends.mkl.is_available() else frozenset()
    monkeypatch.setattr(lowrank, "_divided_here", lambda _: everything)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


def test_rows_are_divided_among_threads_where_that_was_measured_to_be_faster(monkeypatch):
    """Time stands still but for one of the two products."""
    now = [0.0]

    def slow(real, cost):
        return lambda *args, **kwargs: (now.__setitem__(0, now[0] + cost), real(*args, **kwargs))[1]

    monkeypatch.setattr(lowrank, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(lowrank.F, "linear", slow(torch.nn.functional.linear, 1.0))
    for cost, expected in ((0.5, {1, 4, 16}), (0.95, set()), (1.2, set())):
        with monkeypatch.context() as patched:
            patched.setattr(lowrank, "_by_all_threads", slow(lowrank._by_all_threads, cost))
            assert lowrank._divided_here.__wrapped__(2) == expected
    assert lowrank._divided_here.__wrapped__(1) == set(), "one thread divides nothing"


@pytest.mark.parametrize("layouts", [("factors",), ("pivoted",), ("pivoted-columns",), ("shared", "factors")])
def test_factors_are_called_where_somebody_listens_or_stands_in_their_place(statistics, layouts, monkeypatch):
    """With hooks, with a replaced forward and with another module the result is that of the calls, and the calls are made."""
    monkeypatch.setattr(lowrank, "_divided_here", lambda _: frozenset())
    model, _ = compressed(statistics, layouts=layouts)
    x = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    called = []
    with torch.no_grad():
        expected = model(x).logits
        projections = dict.fromkeys(layer.projection for layer in layers)
        hooks = [projection.register_forward_hook(lambda *_: called.append(1)) for projection in projections]
        torch.testing.assert_close(model(x).logits, expected)
        assert len(called) == len(layers)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            if layer.up is not None:
                layer.up.forward = lambda rows, real=layer.up.forward: (called.append(1), real(rows))[1]
        called.clear()
        torch.testing.assert_close(model(x).logits, expected)
        assert len(called) == sum(layer.up is not None for layer in layers)
        one = next(layer for layer in layers if layer.up is not None)
        one.up = torch.nn.Sequential(one.up)
        torch.testing.assert_close(model(x).logits, expected)
    model(x).logits.sum().backward()
    assert all(p.grad is not None for p in layers[0].projection.parameters())


@pytest.mark.parametrize(
    "layouts", [("factors",), ("pivoted",), ("pivoted-columns",), ("shared", "factors"), ("shared", "pivoted")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divided", [True, False])
def test_products_in_place_and_of_one_token_are_those_of_training(statistics, layouts, dtype, divided, monkeypatch):
    """With gradients every product is a new tensor; without, the way depends on the number of tokens."""
    monkeypatch.setattr(lowrank, "_divided_here", lambda _: frozenset({1, 4, 16}) if divided else frozenset())
    model, _ = compressed(statistics, layouts=layouts)
    layers = [module for module in model.to(dtype).modules() if isinstance(module, LowRankLinear)]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        assert {at.device.type for at in layer.buffers()} <= {"cpu"}
        for shape in ((), (1, 1), (1, 3), (2, 1), (40,), (2, 20)):
            x = torch.randn(*shape, layer.in_features, generator=generator).to(dtype)
            before, expected = x.clone(), layer(x)
            close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
            with torch.no_grad():
                torch.testing.assert_close(layer(x), expected, **close)
                torch.testing.assert_close(layer(x[..., None].expand(*x.shape, 2)[..., 0]), expected, **close)  # not contiguous
                with torch.autocast("cpu", torch.bfloat16):
                    assert layer(x.float()).dtype == torch.bfloat16
            assert torch.equal(x, before), "the input stays"


@pytest.mark.parametrize("layouts", [("factors",), ("pivoted",), ("pivoted-columns",), ("shared", "factors")])
def test_weights_that_a_parametrization_or_pruning_keeps_elsewhere_are_found(statistics, tokens, layouts):
    (model, _), (expected, _) = (compressed(statistics, layouts=layouts) for _ in range(2))
    pairs = [(a, b) for a, b in zip(model.modules(), expected.modules(), strict=True) if type(a) is lowrank.FactorLinear]
    assert pairs
    for number, (module, other) in enumerate(pairs):
        if number % 2:
            parametrize.register_parametrization(module, "weight", Doubled())
        else:
            prune.l1_unstructured(module, "weight", amount=0.5)
        other.weight.data.copy_(module.weight)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_another_order_of_the_inputs_is_noticed(statistics):
    """Loading puts another tensor in its place or writes into it; both count."""
    model, _ = compressed(statistics, layouts=("pivoted-columns",))
    layer = next(module for module in model.modules() if isinstance(module, LowRankLinear) and module.down is not None)
    x = torch.randn(1, layer.in_features)
    with torch.no_grad():
        layer(x)
        for assign in (True, False):
            turned = layer.down.order.flip(0).clone()
            layer.load_state_dict({**layer.state_dict(), "down.order": turned}, assign=assign)
            torch.testing.assert_close(layer(x.clone()), x @ layer.weight.mT + layer.bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 96), (1, 96), (96,), (2, 1, 96), (1, 4, 96), (5, 96), (8, 1, 96), (16, 96)])
@pytest.mark.parametrize("bias", ["none", "vector", "row"])
def test_a_few_tokens_by_all_threads_are_the_ordinary_product(shape, bias, four_threads):
    generator = torch.Generator().manual_seed(0)
    several = math.prod(shape) > 96
    for d_out in (512, 510, 1030):
        x, weight = torch.randn(shape, generator=generator), torch.randn(d_out, 96, generator=generator)
        rows = x.numel() // 96
        wide = torch.randn(rows, 2 * d_out, generator=generator)
        biases = {
            "none": None,
            "vector": wide[0, :d_out],
            "row": wide[:, d_out:],
        }  # `row`: part of wider ones, as in PivotColumns
        added = biases[bias]
        with torch.no_grad():
            found = by_all_threads(x, weight, added)
        assert (found is not None) == (torch.backends.mkl.is_available() and not (several and d_out % 4))
        if found is not None:
            assert found.is_contiguous()
            expected = torch.nn.functional.linear(x, weight).view(rows, d_out) + (0 if added is None else added)
            torch.testing.assert_close(found.view(rows, d_out), expected, rtol=1e-5, atol=1e-4)


def test_many_tokens_training_and_other_precisions_take_the_ordinary_product(four_threads):
    weight = torch.randn(512, 96)
    with torch.no_grad():
        assert by_all_threads(torch.randn(17, 96), weight, None) is None
        assert by_all_threads(torch.randn(0, 96), weight, None) is None
        assert by_all_threads(torch.randn(1, 96).bfloat16(), weight.bfloat16(), None) is None
        assert by_all_threads(torch.randn(1, 96), weight.mT.contiguous().mT, None) is None
    assert by_all_threads(torch.randn(1, 96), weight, None) is None, "with gradients"


@pytest.mark.parametrize("layouts", [("factors",), ("pivoted",), ("pivoted-columns",)])
def test_decoding_token_by_token_gives_what_one_pass_gives(layouts):
    """Wide enough that single tokens take the threaded product."""
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**{**CONFIGS["llama"].to_dict(), "hidden_size": 192, "intermediate_size": 512, "head_dim": 48})
    ).eval()
    tokens = torch.randint(3, 128, (16, 24), generator=torch.Generator().manual_seed(1))
    statistics = collect(model, tokens, EVERYTHING)
    options = MethodConfig(name="two-sided", layouts=layouts, allocation="uniform", damping=1e-2)
    compress(model, statistics, pipeline.plan(model, options, BudgetConfig(param_fraction=0.8), statistics=statistics), options)
    with torch.no_grad():
        whole, cache, steps = model(input_ids=tokens[:1]).logits, None, []
        for position in range(tokens.shape[1]):
            one = model(input_ids=tokens[:1, position : position + 1], past_key_values=cache, use_cache=True)
            cache = one.past_key_values
            steps.append(one.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=1e-3)
