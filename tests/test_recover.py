"""Recovery: what is trained, towards what, and what is written."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from fasc import pipeline
from fasc.statistics.collect import collect
from fasc.compression import distillation
from fasc.compression import recover as recovery
from fasc.compression.compress import compress
from fasc.compression.recover import recover
from fasc.compression.options import RecoveryConfig
from fasc.model.options import ModelConfig
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.recipe import Recipe
from fasc.statistics.options import CalibrationConfig
from fasc.errors import ModelError, NonFiniteError, UsageError
from fasc.methods import METHODS
from fasc.layouts.lowrank import LowRankLinear
from tests.conftest import kill_when, tiny_model

CONFIG = RecoveryConfig(batch_tokens=80, learning_rate=3e-3)


def compressed(tokens, architecture="llama", fraction=0.4, layouts=("dense", "factors", "shared", "pivoted", "pivoted-columns")):
    model = tiny_model(architecture)
    statistics = collect(model, tokens, METHODS["fasc"].needs_in(("group", "layer")))
    options = MethodConfig(damping=1e-2, allocation="uniform", layouts=layouts)
    compress(
        model, statistics, pipeline.plan(model, options, BudgetConfig(param_fraction=fraction), statistics=statistics), options
    )
    return model


def apart(dense, model, tokens):
    with torch.no_grad():
        p = F.log_softmax(dense(input_ids=tokens).logits.double(), -1)
        q = F.log_softmax(model(input_ids=tokens).logits.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def others(tokens, count=200):
    return torch.randint(3, 128, (count, tokens.shape[1]), generator=torch.Generator().manual_seed(9))


def test_it_comes_closer_to_the_dense_model_on_text_it_has_not_seen(tokens, architecture):
    dense, model = tiny_model(architecture), compressed(tokens, architecture)
    before = apart(dense, model, tokens)
    done = recover(model, dense, others(tokens), CONFIG)
    assert apart(dense, model, tokens) < 0.9 * before
    assert len(done.losses) == 47, "188 sequences are trained on, 12 held out"
    assert done.after < 0.9 * done.before


def test_the_loss_is_the_divergence_and_its_first_value_that_of_the_model_as_it_was(tokens):
    dense, model = tiny_model(), compressed(tokens)
    text = others(tokens, 5)
    before = apart(dense, model, text[:4])
    losses = recover(model, dense, text, CONFIG).losses
    assert len(losses) == 1
    assert math.isclose(losses[0], before, rel_tol=1e-4)


def test_it_goes_as_far_as_held_out_text_says_and_never_makes_the_model_worse(tokens):
    """The divergences that are told are those of the model on the last sixteenth, before and after."""
    dense, text = tiny_model(), others(tokens, 64)
    shares = []
    for rate in (1e-4, 3e-3, 0.03, 0.3):
        model = compressed(tokens)
        before = apart(dense, model, text[-4:])
        done = recover(model, dense, text, CONFIG.model_copy(update={"learning_rate": rate}))
        assert math.isclose(done.before, before, rel_tol=1e-4)
        assert math.isclose(done.after, apart(dense, model, text[-4:]), rel_tol=1e-4)
        assert done.after <= done.before
        assert done.held_out == 4 * text.shape[1]
        shares.append(done.share)
    assert shares[0] == 1, "small steps end before the best point"
    assert any(0 < share < 1 for share in shares), "larger ones beyond it"


def test_a_recovery_that_only_does_harm_leaves_every_weight_as_it_was(tokens, monkeypatch):
    dense, model = tiny_model(), compressed(tokens)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(distillation._Distillation, "compute_loss", away_from_the_dense_model)
    done = recover(model, dense, others(tokens, 32), CONFIG.model_copy(update={"learning_rate": 0.1}))
    assert (done.share, done.after) == (0, done.before)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def away_from_the_dense_model(trainer, model, inputs, *_args, **_kwargs):
    p, q = (F.log_softmax(one(input_ids=inputs["input_ids"]).logits, -1) for one in (trainer.dense, model))
    return -F.kl_div(q, p.detach(), log_target=True, reduction="batchmean")


@pytest.mark.parametrize("curve", [lambda s: (s - 0.3) ** 2, lambda s: (s - 2) ** 2, lambda s: (s + 1) ** 2, lambda s: -s * s])
def test_the_least_of_a_parabola_is_found_exactly(curve):
    """Of one that bends upwards, inside or at an end; of one that bends downwards, at an end."""
    weight = torch.nn.Parameter(torch.tensor([3.0]))  # went from 1 to 3
    start = [torch.tensor([1.0])]
    share, value = recovery._go_as_far_as_it_helps([weight], start, curve(0), lambda: curve((weight.item() - 1) / 2))
    expected = min((0.0, 0.3, 1.0), key=curve)
    assert math.isclose(share, expected, abs_tol=1e-6)
    assert math.isclose(value, curve(expected), abs_tol=1e-6)
    assert math.isclose(weight.item(), 1 + 2 * share, rel_tol=1e-6)


@pytest.mark.parametrize("entries", [1, 64, 2**21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_divergence_and_its_gradient_are_those_of_autograd(monkeypatch, entries, dtype):
    """Whatever the share of tokens that is looked at together; a logit of 80 apart neither overflows nor disappears."""
    monkeypatch.setattr(distillation, "_ENTRIES", entries)
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(7, 13, generator=generator).mul(4).to(dtype)
    found = torch.randn(7, 13, generator=generator).mul(4).to(dtype)
    found[2, 3], target[4, 5] = 80.0, 80.0
    found.requires_grad_()
    value = distillation.divergence(found, target)
    (2 * value).backward()
    known = found.detach().double().requires_grad_()
    p, q = F.log_softmax(target.double(), -1), F.log_softmax(known, -1)
    expected = (p.exp() * (p - q)).sum(-1).mean()
    (2 * expected).backward()
    assert value.dtype == torch.float32
    assert math.isclose(value.item(), expected.item(), rel_tol=1e-5)
    assert torch.allclose(found.grad.double(), known.grad, atol=1e-7 if dtype == torch.float32 else 2e-3)
    with torch.no_grad():
        assert distillation.divergence(found, target).item() == value.item()
    (slope,) = torch.autograd.grad(distillation.divergence(found, target).square(), found, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_only_low_rank_layers_change_and_stay_as_trainable_as_they_were(tokens):
    dense, model = tiny_model(), compressed(tokens)
    low_rank = {
        f"{name}.{part}" for name, m in model.named_modules() if isinstance(m, LowRankLinear) for part, _ in m.named_parameters()
    }
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    structure = [str(module) for module in model.modules()]
    recover(model, dense, others(tokens, 8), CONFIG)
    assert [str(module) for module in model.modules()] == structure
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name][0])}
    assert changed == low_rank
    assert all(p.requires_grad == before[name][1] and p.grad is None for name, p in model.named_parameters())
    assert not model.training


def test_dropout_of_the_architecture_is_not_part_of_what_is_imitated(tokens):
    """GPT-2 has dropout in training mode; the same seed or another gives the same losses without it."""
    dense = tiny_model("gpt2")
    losses = []
    for _ in range(2):
        model = compressed(tokens, "gpt2")
        losses.append(recover(model, dense, others(tokens, 9), CONFIG).losses)
        torch.manual_seed(99)
    assert losses[0] == losses[1]
    assert math.isclose(losses[0][0] + losses[0][1], sum(losses[1]), rel_tol=1e-6)


def test_what_cannot_be_recovered_is_refused(tokens):
    with pytest.raises(UsageError, match="no compressed layers"):
        recover(tiny_model(), tiny_model(), tokens, CONFIG)
    with torch.no_grad():
        broken = compressed(tokens)
        next(m for m in broken.modules() if isinstance(m, LowRankLinear)).up.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="the divergence of the compressed model"):
        recover(broken, tiny_model(), tokens, CONFIG)
    with pytest.raises(UsageError, match="1 sequence is too few"):
        recover(compressed(tokens), tiny_model(), tokens[:1], CONFIG)
    with pytest.raises(NonFiniteError, match="recovery step"):
        recover(compressed(tokens), tiny_model(), others(tokens, 64), CONFIG.model_copy(update={"learning_rate": 1e30}))


def test_a_checkpoint_is_recovered_into_another_that_says_so(model_folder, text_file, tmp_path, capsys):
    recipe = Recipe(
        source=ModelConfig(model=str(model_folder)),
        calibration=CalibrationConfig(corpus=str(text_file), sequences=16, sequence_length=16),
        methods=(MethodConfig(damping=1e-2, layouts=("dense", "factors", "shared", "pivoted")),),
        budgets=(BudgetConfig(param_fraction=0.5),),
    )
    first, second = tmp_path / "compressed", tmp_path / "recovered"
    pipeline.compress_model(recipe, first)
    config = RecoveryConfig(sequences=42, sequence_length=16, batch_tokens=64, learning_rate=3e-3)
    told = pipeline.recover_and_save(ModelConfig(model=str(first)), second, config)
    assert told.after < told.before
    assert len(told.losses) == 10
    made = json.loads((second / "fasc_provenance.json").read_text())
    assert made["recovery"]["tokens"] == 672
    assert made["recovery"]["kl"]["after"] == told.after
    assert made["model"] == str(model_folder)
    assert "towards the dense model" in (second / "README.md").read_text()
    plain, trained = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert {name: t.shape for name, t in plain.items()} == {name: t.shape for name, t in trained.items()}
    model = AutoModelForCausalLM.from_pretrained(second)
    assert any(isinstance(module, LowRankLinear) for module in model.modules())
    assert pipeline.texts_seen(second) == {made["statistics"]["text_digest"], made["recovery"]["text_digest"]}
    again = config.model_copy(update={"seed": 3, "sequences": 4})
    pipeline.recover_and_save(ModelConfig(model=str(second)), tmp_path / "again", again)
    both = json.loads((tmp_path / "again" / "fasc_provenance.json").read_text())["recovery"]
    assert (both["seed"], both["after"]) == (3, made["recovery"])
    assert pipeline.texts_seen(tmp_path / "again") == pipeline.texts_seen(second) | {both["text_digest"]}
    assert (tmp_path / "again" / "README.md").read_text().count("towards the dense model") == 2
    assert "{" not in capsys.readouterr().out, "the trainer's own lines are not ours"
    with pytest.raises(ModelError, match="no checkpoint of fasc"):
        pipeline.recover_and_save(ModelConfig(model=str(model_folder)), tmp_path / "third", config)


def test_an_interrupted_training_goes_on_from_its_last_whole_state(tokens, tmp_path, monkeypatch):
    """After step 7 of 13: steps 1 to 7 are not done again, and nothing tells the result from that of a run nobody disturbed."""
    dense, text = tiny_model(), others(tokens, 52)
    undisturbed, model = compressed(tokens), compressed(tokens)
    expected = recover(undisturbed, dense, text, CONFIG)
    assert len(expected.losses) == 13
    monkeypatch.setattr(distillation, "_SAVE_SECONDS", 0.0)
    real = distillation._Distillation.compute_loss

    def stop_in_step_8(trainer, *args, **kwargs):
        if trainer.state.global_step == 7:
            raise KeyboardInterrupt
        return real(trainer, *args, **kwargs)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(distillation._Distillation, "compute_loss", stop_in_step_8)
        recover(model, dense, text, CONFIG, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-7"]
    assert {path.suffix for path in (tmp_path / "checkpoint-7").iterdir()} == {".safetensors", ".json"}, "no pickles"
    assert not any(p.requires_grad != q.requires_grad for p, q in zip(model.parameters(), undisturbed.parameters(), strict=True))
    (tmp_path / "checkpoint-8").mkdir()  # killed while it wrote this one
    (tmp_path / "checkpoint-8" / "model.safetensors").write_bytes(b"half")
    steps = []
    monkeypatch.setattr(distillation._Distillation, "compute_loss", lambda t, *a, **k: (steps.append(1), real(t, *a, **k))[1])
    fresh = compressed(tokens)
    assert recover(fresh, dense, text, CONFIG, tmp_path) == expected
    assert len(steps) == 6
    for name, value in undisturbed.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_a_killed_recovery_goes_on_and_gives_the_same_bytes(model_folder, tmp_path):
    """SIGKILL after the text was sampled and in the middle of the training; the state is saved at every step here."""
    first, undisturbed, out, work = (tmp_path / name for name in ("compressed", "undisturbed", "out", ".out.work"))
    recipe = Recipe(
        source=ModelConfig(model=str(model_folder)),
        calibration=CalibrationConfig(corpus="self", sequences=16, sequence_length=16),
        methods=(MethodConfig(damping=1e-2),),
        budgets=(BudgetConfig(param_fraction=0.5),),
    )
    pipeline.compress_model(recipe, first)
    program = "from fasc.compression import distillation; distillation._SAVE_SECONDS = 0; from fasc.cli.app import main; main()"
    command = [sys.executable, "-c", program, "recover", str(first), "--sequences", "192", "--sequence-length", "16"]
    command += ["--batch-tokens", "32", "--learning-rate", "3e-3"]

    def run(folder):
        return subprocess.run([*command, "--out", str(folder)], capture_output=True, text=True, check=False)

    assert run(undisturbed).returncode == 0
    for moment in ("text.safetensors", "checkpoint-[1-9][0-9]/losses.json"):
        kill_when([*command, "--out", str(out)], work, moment)
        if not work.exists():
            pytest.skip("the process was faster than the signal")
        assert not out.exists(), "nothing half-written stands where the checkpoint will"
    again = run(out)
    assert again.returncode == 0, again.stderr
    assert "sampling text" not in again.stderr
    assert int(re.search(r"recovering: [\d,]+/([\d,]+) tokens", again.stderr)[1].replace(",", "")) <= (90 - 10) * 32
    for name in ("model.safetensors", "config.json", "fasc_plan.json"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert not work.exists()
