"""Recovery: what is trained, towards what, how far, and how it goes on after a kill.

A compressed model is here one whose layers are two plain ones in a row, so that nothing needs to be planned.
"""

import json
import math
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn import functional as F

from fasc.compression import distillation
from fasc.compression import recover as recovery
from fasc.compression.options import RecoveryConfig
from fasc.compression.recover import recover
from fasc.errors import ModelError, NonFiniteError, StorageError, UsageError
from fasc.model.layers import select_layers, weight_of
from fasc.model.options import LayersConfig
from tests.conftest import tiny_model
from tests.processes import together

CONFIG = RecoveryConfig(batch_tokens=80, learning_rate=3e-3)


def compressed(architecture="llama", rank=12):
    """A model whose every layer is the best two of a low rank, and these."""
    model = tiny_model(architecture)
    replaced = []
    for name, layer in select_layers(model, LayersConfig()).items():
        u, s, vh = torch.linalg.svd(weight_of(model, layer).detach(), full_matrices=False)
        old = model.get_submodule(name)
        new = nn.Sequential(nn.Linear(layer.d_in, rank, bias=False), nn.Linear(rank, layer.d_out))
        with torch.no_grad():
            new[0].weight.copy_(vh[:rank])
            new[1].weight.copy_(u[:, :rank] * s[:rank])
            new[1].bias.copy_(torch.zeros(layer.d_out) if old.bias is None else old.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new.eval())
        replaced.append(new)
    return model, replaced


def apart(dense, model, tokens):
    with torch.no_grad():
        p = F.log_softmax(dense(input_ids=tokens).logits.double(), -1)
        q = F.log_softmax(model(input_ids=tokens).logits.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def others(count=200):
    return torch.randint(3, 128, (count, 20), generator=torch.Generator().manual_seed(9))


def test_it_comes_closer_to_the_dense_model_on_text_it_has_not_seen(tokens, architecture):
    dense, (model, layers) = tiny_model(architecture), compressed(architecture)
    before = apart(dense, model, tokens)
    done = recover(model, dense, others(), CONFIG, layers=layers)
    assert apart(dense, model, tokens) < 0.9 * before
    assert len(done.losses) == 47, "188 sequences are trained on, 12 held out"
    assert done.after < 0.9 * done.before


def test_in_bfloat16_it_comes_closer_as_well(tokens):
    dense, (model, layers) = tiny_model(), compressed()
    before = apart(dense, model, tokens)
    recover(model, dense, others(), CONFIG.model_copy(update={"mixed_precision": True}), layers=layers)
    assert apart(dense, model, tokens) < 0.9 * before
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_the_loss_is_the_divergence_and_its_first_value_that_of_the_model_as_it_was():
    dense, (model, layers), text = tiny_model(), compressed(), others(5)
    before = apart(dense, model, text[:4])
    losses = recover(model, dense, text, CONFIG, layers=layers).losses
    assert len(losses) == 1
    assert math.isclose(losses[0], before, rel_tol=1e-4)


def test_it_goes_as_far_as_held_out_text_says_and_never_makes_the_model_worse():
    """The divergences that it gives are those of the model on the last sixteenth, before and after."""
    dense, text = tiny_model(), others(64)
    shares = []
    for rate in (1e-4, 3e-3, 0.03, 0.3):
        model, layers = compressed()
        before = apart(dense, model, text[-4:])
        done = recover(model, dense, text, CONFIG.model_copy(update={"learning_rate": rate}), layers=layers)
        assert math.isclose(done.before, before, rel_tol=1e-4)
        assert math.isclose(done.after, apart(dense, model, text[-4:]), rel_tol=1e-4)
        assert done.after <= done.before
        assert done.held_out == 4 * text.shape[1]
        shares.append(done.share)
    assert shares[0] == 1, "small steps end before the best point"
    assert any(0 < share < 1 for share in shares), "larger ones beyond it"


def test_a_recovery_that_only_does_harm_leaves_every_weight_as_it_was(monkeypatch):
    dense, (model, layers) = tiny_model(), compressed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    real = distillation.divergence_of
    monkeypatch.setattr(distillation, "divergence_of", lambda *args, **options: -real(*args, **options))
    done = recover(model, dense, others(32), CONFIG.model_copy(update={"learning_rate": 0.1}), layers=layers)
    assert done.losses[-1] < done.losses[0] < 0, "it went away from the dense model"
    assert (done.share, done.after) == (0, done.before)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("curve", [lambda s: (s - 0.3) ** 2, lambda s: (s - 2) ** 2, lambda s: (s + 1) ** 2, lambda s: -s * s])
def test_the_least_of_a_parabola_is_found_exactly(curve):
    """Of one that bends upwards, inside or at an end; of one that bends downwards, at an end."""
    weight = nn.Parameter(torch.tensor([3.0]))  # went from 1 to 3
    start = [torch.tensor([1.0])]
    share, value = recovery._go_as_far_as_it_helps([weight], start, curve(0), lambda: curve((weight.item() - 1) / 2))
    expected = min((0.0, 0.3, 1.0), key=curve)
    assert math.isclose(share, expected, abs_tol=1e-6)
    assert math.isclose(value, curve(expected), abs_tol=1e-6)
    assert math.isclose(weight.item(), 1 + 2 * share, rel_tol=1e-6)


def test_an_end_that_is_not_finite_is_never_chosen():
    weight = nn.Parameter(torch.tensor([float("nan")]))
    share, value = recovery._go_as_far_as_it_helps([weight], [torch.tensor([1.0])], 4.0, weight.item)
    assert (share, value, weight.item()) == (0, 4, 1)


def test_only_the_chosen_layers_change_and_all_is_as_trainable_as_it_was():
    dense, (model, layers) = tiny_model(), compressed()
    model.model.norm.requires_grad_(requires_grad=False)
    layers[0].requires_grad_(requires_grad=False)
    model.lm_head.weight.grad = gradient = torch.ones_like(model.lm_head.weight)
    dense.train()
    chosen = {id(parameter) for layer in layers[:5] for parameter in layer.parameters()}
    before = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    recover(model, dense, others(8), CONFIG, layers=layers[:5])
    for name, parameter in model.named_parameters():
        value, trainable, grad = before[name]
        assert torch.equal(parameter, value) != (id(parameter) in chosen), name
        assert parameter.requires_grad == trainable
        assert parameter.grad is grad
    assert gradient.eq(1).all()
    assert dense.training
    assert not model.training


def test_dropout_of_the_architecture_is_not_part_of_what_is_imitated():
    """GPT-2 has dropout in training mode; the state of torch's random numbers makes no difference."""
    dense = tiny_model("gpt2").train()
    losses = []
    for seed in (1, 99):
        torch.manual_seed(seed)
        model, layers = compressed("gpt2")
        model.train()
        losses.append(recover(model, dense, others(9), CONFIG, layers=layers).losses)
        assert model.training, "and is left in the mode it had"
    assert losses[0] == losses[1]


def test_the_seed_draws_the_order_of_the_text():
    dense, text, losses = tiny_model(), others(52), {}
    for seed in (0, 0, 1):
        model, layers = compressed()
        config = CONFIG.model_copy(update={"seed": seed, "learning_rate": 1e-12})
        again = recover(model, dense, text, config, layers=layers).losses
        assert losses.setdefault(seed, again) == again
    assert losses[0] != losses[1]
    assert math.isclose(sum(losses[0][:-1]), sum(losses[1][:-1]), rel_tol=0.2), "of the same text"


def test_what_cannot_be_recovered_is_refused():
    dense, (model, layers) = tiny_model(), compressed()
    with pytest.raises(UsageError, match="no compressed layers"):
        recover(tiny_model(), dense, others(), CONFIG)
    with pytest.raises(UsageError, match="1 sequence is too few"):
        recover(model, dense, others(1), CONFIG, layers=layers)
    with pytest.raises(NonFiniteError, match="recovery step"):
        recover(model, dense, others(64), CONFIG.model_copy(update={"learning_rate": 1e30}), layers=layers)
    assert all(parameter.requires_grad for parameter in model.parameters()), "also where it fails"
    dense.config.vocab_size += 1
    with pytest.raises(ModelError, match="vocabularies differ: 128 and 129"):
        recover(model, dense, others(), CONFIG, layers=layers)
    half, layers = compressed()
    with pytest.raises(UsageError, match="bfloat16"):
        recover(half.bfloat16(), tiny_model(), others(), CONFIG, layers=layers)
    broken, layers = compressed()
    with torch.no_grad():
        layers[3][1].weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="the divergence of the compressed model"):
        recover(broken, tiny_model(), others(), CONFIG, layers=layers)


@pytest.fixture
def undisturbed():
    """What 13 steps give that nobody disturbs: the result and the weights."""
    model, layers = compressed()
    done = recover(model, tiny_model(), others(52), CONFIG, layers=layers)
    assert len(done.losses) == 13
    return done, model.state_dict()


def require_same(model, state):
    for name, value in state.items():
        assert torch.equal(value, model.state_dict()[name]), name


@pytest.fixture
def steps(monkeypatch):
    """One entry for each step that is taken from here on; an interrupt comes in the step that is set."""

    class Steps(list):
        interrupt = None

    taken, real = Steps(), distillation.divergence_of

    def count(*args, **options):
        taken.append(None)
        if len(taken) == taken.interrupt:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(distillation, "divergence_of", count)
    monkeypatch.setattr(distillation, "_SAVE_SECONDS", 0.0)
    return taken


def test_an_interrupted_training_goes_on_from_its_last_whole_state(undisturbed, steps, tmp_path):
    """After step 7 of 13: steps 1 to 7 are not done again, and nothing tells the result from that of a run nobody disturbed."""
    dense, text = tiny_model(), others(52)
    steps.interrupt = 8
    (model, layers), work = compressed(), tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        recover(model, dense, text, CONFIG, work, layers=layers)
    assert [path.name for path in work.iterdir()] == [distillation._STATE], "one file, and no pickle"
    assert all(parameter.requires_grad for parameter in model.parameters())
    (work / f".{distillation._STATE}.partial").write_bytes(b"half")  # killed while it wrote the next one
    steps.clear()
    model, layers = compressed()
    assert recover(model, dense, text, CONFIG, work, layers=layers) == undisturbed[0]
    assert len(steps) == 6
    require_same(model, undisturbed[1])


def test_a_damaged_state_is_not_believed(undisturbed, steps, tmp_path, capsys):
    (tmp_path / distillation._STATE).write_bytes(b"\x08\0\0\0\0\0\0\0{not it}")
    model, layers = compressed()
    assert recover(model, tiny_model(), others(52), CONFIG, tmp_path, layers=layers) == undisturbed[0]
    assert len(steps) == 13
    assert "starts anew" in capsys.readouterr().err
    require_same(model, undisturbed[1])


@pytest.mark.parametrize("problem", ["before", "while writing", "in the library"])
def test_where_the_state_cannot_be_written_the_training_goes_on(undisturbed, steps, tmp_path, monkeypatch, capsys, problem):
    """The disk fills up after step 4; the state of that step stays, and is whole."""
    real = distillation.save_file

    def full_before(folder, needed):
        if len(steps) > 4:
            raise StorageError("no space left", "free some")

    def full_while_writing(state, file):
        Path(file).write_bytes(b"half")
        if len(steps) > 4:
            raise OSError(28, "No space left on device") if problem == "while writing" else SafetensorError("I/O error: full")
        real(state, file)

    if problem == "before":
        monkeypatch.setattr(distillation, "require_free_space", full_before)
    else:
        monkeypatch.setattr(distillation, "save_file", full_while_writing)
    model, layers = compressed()
    assert recover(model, tiny_model(), others(52), CONFIG, tmp_path, layers=layers) == undisturbed[0]
    require_same(model, undisturbed[1])
    assert "goes on without being saved" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [distillation._STATE]
    assert len(distillation.load_file(tmp_path / distillation._STATE)["losses"]) == 4


PROGRAM = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from fasc.compression import distillation
from tests.compression.test_recover import CONFIG, compressed, others, recover, tiny_model
distillation._SAVE_SECONDS = 0
model, layers = compressed()
done = recover(model, tiny_model(), others(1200), CONFIG, Path(sys.argv[1]) / "work", layers=layers)
state = {name: value.clone() for name, value in model.state_dict().items()}
save_file(state, Path(sys.argv[1]) / "recovered.safetensors", {"done": repr(done)})
"""


def test_a_killed_recovery_goes_on_and_gives_the_same_bytes(tmp_path):
    """SIGKILL in the middle of the training, twice; the state is saved at every step here."""
    with ExitStack() as stack:

        def start(folder):
            folder.mkdir(exist_ok=True)
            command = [sys.executable, "-c", PROGRAM, str(folder)]
            process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        whole, killed = tmp_path / "whole", tmp_path / "killed"
        undisturbed, state, seen = start(whole), killed / "work" / distillation._STATE, []
        for _ in range(2):
            process = start(killed)
            before = state.stat().st_mtime_ns if state.exists() else 0
            while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before):
                time.sleep(0.001)
            process.kill()
            process.wait()
            assert not (killed / "recovered.safetensors").exists()
            seen.append(len(distillation.load_file(state)["losses"]))
        assert 0 < seen[0] < seen[1] < 282
        assert (start(killed).wait(), undisturbed.wait()) == (0, 0)
    expected = (whole / "recovered.safetensors").read_bytes()
    assert (killed / "recovered.safetensors").read_bytes() == expected


SHARED = CONFIG.model_copy(update={"batch_tokens": 100})
"""Five sequences a step: the shares of two and of four processes differ by one."""


def trained(work=None):
    """What training came to: divergences, every step's loss, and the weights; as JSON."""
    model, layers = compressed()
    result = recover(model, tiny_model(), others(33), SHARED, work, layers=layers)
    weights = torch.cat([parameter.detach().flatten() for layer in layers for parameter in layer.parameters()])
    return json.dumps([[result.before, result.after, result.share, *result.losses], weights.tolist()])


def test_several_processes_train_as_one_does(tmp_path):
    """The stated bound; the last step has one sequence, and all but one process no share of it."""
    numbers, weights = json.loads(trained())
    for count in (2, 4):
        said = together(count, tmp_path, lambda _: trained())
        assert len(set(said)) == 1, "all processes hold the same weights"
        several, theirs = json.loads(said[0])
        assert several == pytest.approx(numbers, rel=1e-6)
        assert theirs == pytest.approx(weights, rel=0, abs=1e-3 * SHARED.learning_rate)


def test_a_process_that_ends_ends_the_training_which_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "_SAVE_SECONDS", 0)
    work = tmp_path / "work"
    work.mkdir()

    def ending(processes):
        clip, steps = distillation.nn.utils.clip_grad_norm_, iter(range(4))

        def fails(*arguments):
            if processes.rank == 1 and next(steps) == 3:
                raise NonFiniteError("the fourth step", "this is a test")
            clip(*arguments)

        distillation.nn.utils.clip_grad_norm_ = fails  # in this process alone
        return trained(work)

    assert together(2, tmp_path, ending) == [
        "error: another process ended",
        "error: the fourth step is not finite (NaN or infinity)",
    ]
    assert len(distillation.load_file(work / distillation._STATE)["losses"]) == 4, "the first process took the step and saved it"
    assert together(2, tmp_path, lambda _: trained(work)) == together(2, tmp_path, lambda _: trained())
