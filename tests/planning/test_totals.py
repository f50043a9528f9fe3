"""A plan's totals are the sizes that are really stored."""

import pytest
import torch

from fasc.compression.compress import carry_out
from fasc.edits.factor import Factor
from fasc.layouts import LAYOUTS
from fasc.stages.plan import plan
from tests.conftest import tiny_model
from tests.planning.stored import stored_bytes, stored_numbers

STORED = sorted(name for name, layout in LAYOUTS.items() if not layout.leaves_dense)


def sizes(model):
    return stored_numbers(model), stored_bytes(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", STORED)
def test_parameters_and_bytes_of_every_layout_are_those_of_the_state(statistics, layout, dtype):
    model = tiny_model(dtype=dtype)
    allowed = (layout,) if layout == "merged" else (layout, "merged")
    made = plan(model, statistics, layouts=allowed, allocation="uniform", rank_fraction=0.4)
    assert layout in {edit.layout for edit in made.edits}
    carry_out(model, statistics, made)
    assert sizes(model) == (made.totals["parameters"], made.totals["bytes"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", ["shared", "factors"])
def test_a_plan_of_all_layouts_and_fewer_channels_weighs_what_it_says(statistics, scope, dtype):
    for fraction in (0.4, 0.6, 0.8):
        model = tiny_model(dtype=dtype)
        layouts = ("dense", "channels", scope, "pivoted", "pivoted-columns")
        made = plan(model, statistics, layouts=layouts, param_fraction=fraction)
        carry_out(model, statistics, made)
        assert sizes(model) == (made.totals["parameters"], made.totals["bytes"])
        assert made.parameters == sum(layer_numbers(model, made))
        assert made.totals["param_fraction"] == made.parameters / sum(layer.parameters for layer in made.layers)


def layer_numbers(model, made):
    """Numbers stored by each of the layers that the plan may touch."""
    for layer in made.layers:
        yield sum(tensor.numel() for tensor in model.get_submodule(layer.name).state_dict().values())


def test_an_empty_plan_is_the_dense_model(statistics):
    model = tiny_model()
    made = plan(model, statistics, param_fraction=1.0)
    assert made.edits == ()
    before = sizes(model)
    carry_out(model, statistics, made)
    assert sizes(model) == before == (made.totals["parameters"], made.totals["bytes"])
    assert made.totals["param_fraction"] == made.totals["model_fraction"] == made.totals["multiply_add_fraction"] == 1
    assert made.predicted_loss == 0


def test_zeros_are_no_parameters_and_stay_stored_and_removed_parts_do_not(statistics):
    for name in ("magnitude", "llm-pruner"):
        model = tiny_model()
        made = plan(model, statistics, method=name, param_fraction=0.6)
        outside = stored_numbers(model) - made.dense_parameters
        carry_out(model, statistics, made)
        nonzero = sum(int((model.get_submodule(layer.name).weight != 0).sum()) for layer in made.layers)
        assert made.totals["parameters"] == outside + nonzero
        assert made.totals["bytes"] == stored_bytes(model)


def test_the_rank_fraction_counts_what_no_edit_factors_as_of_full_rank(statistics):
    made = plan(tiny_model(), statistics, layouts="dense,factors", param_fraction=0.7)
    ranks = {name: edit.rank for edit in made.edits if isinstance(edit, Factor) for name in edit.layers}
    full = {layer.name: min(layer.d_in, layer.d_out) for layer in made.layers}
    assert ranks.keys() < full.keys()
    assert made.totals["rank_fraction"] == pytest.approx(sum({**full, **ranks}.values()) / sum(full.values()))


def test_multiply_adds_are_those_of_the_linear_layers(statistics, tokens):
    """Every product of a compressed model is one of an ordinary linear layer: they are counted by hooks."""
    model = tiny_model()
    made = plan(model, statistics, param_fraction=0.6)
    carry_out(model, statistics, made)
    names = tuple(layer.name for layer in made.layers)
    per_token = []

    def count(module, _args, output):
        per_token.append(module.in_features * output.shape[-1])

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and any(name == one or name.startswith(f"{one}.") for one in names):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(input_ids=tokens[:1])
    dense = sum(layer.d_in * layer.d_out for layer in made.layers)
    assert sum(per_token) / dense == pytest.approx(made.totals["multiply_add_fraction"])
