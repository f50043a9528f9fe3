"""Rounded units: dense, narrowed and in every layout; what is planned is what is stored, and loads exactly."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasc.compression.compress import carry_out
from fasc.compression.merge import merge
from fasc.edits.factor import Factor
from fasc.edits.narrow import Narrow
from fasc.edits.quantise import Quantise
from fasc.edits.structure import check_edits
from fasc.errors import ModelError, StatisticsError, UsageError
from fasc.layouts.quantised import QuantisedLinear
from fasc.model.groups import Unit
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.serving.quantizer import attach
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from tests.conftest import tiny_model

LAYOUTS = [
    ("factors",),
    ("shared",),
    ("pivoted",),
    ("pivoted-columns",),
    ("merged", "factors"),
    ("dense",),
    ("dense", "channels"),
]


@pytest.fixture(scope="module")
def measured(tokens):
    known = {}

    def of(architecture="llama"):
        if architecture not in known:
            known[architecture] = collect_moments(tiny_model(architecture), tokens, needs_for(MethodConfig(bits=(4,)), None))
        return known[architecture]

    return of


def rounded_plan(model, statistics, bits, layouts):
    """Every unit of a plan at 0.7 of the size, rounded."""
    made = plan(model, statistics, layouts=layouts, **({"max_kl": 10.0} if "dense" in layouts else {"param_fraction": 0.7}))
    left = {layer.name: layer for layer in made.layers}
    for edit in made.edits:
        if isinstance(edit, Narrow):
            left |= {layer.name: layer for layer in edit._left()}
    groups = {layer.name: group.group.name for group in statistics.groups.values() for layer in group.group.layers}
    factored = [edit for edit in made.edits if isinstance(edit, Factor)]
    rounding = [
        Quantise(group=one.group, layers=one.layers, maps=tuple(one.stored.maps(one.unit, one.rank)), bits=bits, group_size=16)
        for one in factored
    ]
    done = {name for edit in factored for name in edit.layers}
    for name, layer in left.items():
        if name not in done:
            unit = Unit(groups[name], (layer,))
            maps = ((unit.d_in, unit.d_out),)
            rounding.append(Quantise(group=unit.group, layers=(name,), maps=maps, bits=bits, group_size=16))
    return made, made.with_edits([*made.edits, *rounding])


@pytest.mark.parametrize("layouts", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("bits", [3, 8])
def test_it_is_stored_in_as_many_bytes_as_planned_and_loads_exactly(layouts, bits, measured, tokens, tmp_path):
    model = tiny_model()
    _, rounded = rounded_plan(model, measured(), bits, layouts)
    carry_out(model, measured(), rounded)
    attach(model)
    stored = sum(one.numel() * one.element_size() for name, one in model.state_dict().items() if name != "lm_head.weight")  # tied
    slack = bits * len(rounded.layers)  # zeros of a shared unit are packed layer by layer
    assert rounded.totals["bytes"] <= stored <= rounded.totals["bytes"] + slack
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(tokens[:2]).logits, loaded(tokens[:2]).logits)


@pytest.mark.parametrize("layouts", LAYOUTS, ids="+".join)
def test_eight_bits_change_little_of_what_the_other_edits_made(layouts, measured, tokens):
    plain, model = tiny_model(), tiny_model()
    unrounded, rounded = rounded_plan(model, measured(), 8, layouts)
    carry_out(plain, measured(), unrounded)
    carry_out(model, measured(), rounded)
    with torch.no_grad():
        before, after = plain(tokens[:4]).logits, model(tokens[:4]).logits
    assert (after - before).norm() < 0.05 * before.norm()


def test_a_checkpoint_loads_in_a_new_process(measured, tokens, tmp_path):
    model = tiny_model()
    carry_out(model, measured(), rounded_plan(model, measured(), 4, ("pivoted", "dense"))[1])
    attach(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        torch.save({"tokens": tokens[:2], "logits": model(tokens[:2]).logits}, tmp_path / "expected.pt")
    code = (
        "import sys, torch, fasc; from transformers import AutoModelForCausalLM; torch.set_grad_enabled(False); "
        "want = torch.load(sys.argv[1] + '/expected.pt'); model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "assert torch.equal(model(want['tokens']).logits, want['logits'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "layouts", [("factors",), ("shared",), ("pivoted",), ("pivoted-columns",), ("dense", "channels")], ids="+".join
)
def test_a_bias_further_on_keeps_the_mean_output(layouts, measured):
    statistics = measured()
    plain, model = tiny_model(), tiny_model()
    unrounded, rounded = rounded_plan(model, statistics, 2, layouts)
    carry_out(plain, statistics, unrounded)
    carry_out(model, statistics, rounded)
    for group in statistics.groups.values():
        for layer in group.group.layers:
            old, new = plain.get_submodule(layer.name), model.get_submodule(layer.name)
            mean = group.input.mean
            if old.bias is None or len(mean) != (new.in_features if hasattr(new, "in_features") else 0):
                continue
            with torch.no_grad():
                torch.testing.assert_close(new(mean), old(mean), rtol=1e-3, atol=1e-3)


def test_a_dense_unit_is_forecast_to_lose_what_it_loses(measured, tokens):
    model, statistics = tiny_model(), measured()
    edit = Quantise(group="model.layers.0.mlp.down_proj", layers=("model.layers.0.mlp.down_proj",), maps=((48, 32),), bits=3)
    dense = model.get_submodule(edit.layers[0]).weight.detach().double()
    edit.apply(model, statistics)
    error = dense - model.get_submodule(edit.layers[0]).weight.double()
    group = statistics.group(edit.group)
    second = group.input.matrix.double() + torch.outer(group.input.mean, group.input.mean).double()
    scale = group.extras[f"output_scale/{edit.group}"].double()
    slow = 0.5 * sum(float(scale[o] * error[o] @ second @ error[o]) for o in range(32))
    recorded = model.config.quantization_config.edits[0]["predicted_loss"]
    assert recorded == pytest.approx(slow, rel=1e-4)


def test_a_layer_is_rounded_once_and_last(measured):
    unit = {"group": "model.layers.0.mlp.down_proj", "layers": ("model.layers.0.mlp.down_proj",)}
    rounding = Quantise(**unit, maps=((48, 32),), bits=4)
    factoring = Factor(**unit, d_in=48, d_outs=(32,), biases=(False,), rank=4, layout="factors", method="fasc")
    check_edits([factoring, rounding.model_copy(update={"maps": ((48, 4), (4, 32))})], tiny_model())
    for edits in ([rounding, rounding], [rounding, factoring], [factoring, factoring]):
        with pytest.raises(ModelError):
            check_edits(edits, tiny_model())


def test_other_sizes_than_the_plan_says_are_refused_before_anything_is_changed(measured):
    model = tiny_model()
    edit = Quantise(group="model.layers.0.mlp.down_proj", layers=("model.layers.0.mlp.down_proj",), maps=((48, 31),), bits=4)
    with pytest.raises(ModelError, match=r"1,536 weights here and 1,488"):
        edit.apply(model, measured())
    assert isinstance(model.get_submodule(edit.layers[0]), torch.nn.Linear)


def test_a_layer_outside_of_the_statistics_is_refused(measured):
    edit = Quantise(group="model.layers.9.mlp.down_proj", layers=("model.layers.0.mlp.down_proj",), maps=((48, 32),), bits=4)
    with pytest.raises(StatisticsError):
        edit.require(measured())


def test_a_rounded_model_cannot_be_merged(measured):
    model = tiny_model()
    carry_out(model, measured(), rounded_plan(model, measured(), 4, ("factors",))[1])
    with pytest.raises(UsageError, match="few bits"):
        merge(model, measured(), 1e-4)


def test_the_scales_survive_a_change_of_precision():
    layer = QuantisedLinear(8, 4, 4, 8, bias=True)
    scales = torch.rand(4, 1).half()
    layer.scales.copy_(scales.view(torch.int16))
    layer.to(torch.bfloat16).to(torch.float32)
    assert torch.equal(layer.rounded().grid.scales, scales.float())


@pytest.mark.parametrize("architecture", ["gpt2", "qwen2", "gemma2", "phi3"])
def test_other_architectures_are_rounded_and_load(architecture, measured, tokens, tmp_path):
    model = tiny_model(architecture)
    made = plan(model, measured(architecture), max_bytes=10**7, bits=(4,), bits_group=16)
    assert {edit.edit for edit in made.edits} >= {"quantise"}
    carry_out(model, measured(architecture), made)
    attach(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(tokens[:2]).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(tokens[:2]).logits)
