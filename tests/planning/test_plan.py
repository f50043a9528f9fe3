"""A plan survives its file; a damaged file is refused by name and never half believed."""

import json
import math
import random

import pytest
import torch

from fasc.compression.compress import carry_out
from fasc.errors import BudgetError, FascError
from fasc.planning.plan import FORMAT, Plan
from fasc.stages.plan import plan
from tests.conftest import tiny_model

KINDS = {
    "fasc": {"param_fraction": 0.6},
    "svd": {"rank_fraction": 0.5},
    "magnitude": {"param_fraction": 0.6},
    "llm-pruner": {"param_fraction": 0.6},
}
"""One plan with edits of each kind."""


@pytest.fixture(scope="module")
def plans(statistics):
    made = {name: plan(tiny_model(), statistics, method=name, **budget) for name, budget in KINDS.items()}
    assert {edit.edit for one in made.values() for edit in one.edits} == {"narrow", "factor", "mask", "remove"}
    return made


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())


@pytest.mark.parametrize("name", KINDS)
def test_plans_survive_json(plans, tmp_path, name):
    made = plans[name]
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert Plan.load(made.save(tmp_path / "plan.json")) == made
    assert Plan.load(str(tmp_path / "plan.json")).to_dict() == made.to_dict()


def test_a_plan_that_was_carried_out_survives_json_too(statistics, tmp_path):
    model = tiny_model()
    done = carry_out(model, statistics, plan(model, statistics, param_fraction=0.6))
    assert any(edit.facts for edit in done.edits if edit.edit == "factor")
    assert Plan.load(done.save(tmp_path / "plan.json")) == done


def test_the_file_says_what_a_reader_asks_first(plans):
    raw = plans["fasc"].to_dict()
    assert {"rank_fraction", "param_fraction", "model_fraction", "bytes", "predicted_loss"} <= set(raw["totals"])
    assert raw["totals"] == plans["fasc"].totals
    assert raw["forecast_memory"]["moments"] > 0
    assert raw["dense_nll"] > 0


def test_a_loaded_plan_makes_the_same_model(plans, statistics, tmp_path):
    states = []
    for made in (plans["fasc"], Plan.load(plans["fasc"].save(tmp_path / "plan.json"))):
        model = tiny_model()
        carry_out(model, statistics, made)
        states.append(model.state_dict())
    assert_same(*states)


@pytest.mark.parametrize("version", [1, 2, 3, 4, FORMAT + 1, None, "5", 5.5, True])
def test_other_formats_are_refused_in_one_line(plans, tmp_path, version):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**plans["fasc"].to_dict(), "format": version}))
    with pytest.raises(BudgetError, match="not a plan of format") as refused:
        Plan.load(file)
    assert str(file) in refused.value.message
    assert "\n" not in str(refused.value)


def test_no_plan_at_all_is_refused_in_one_line(tmp_path):
    for text in ("", "[]", "null", "5", "{}", "{", "[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"format": 5, "edits": {}}'):
        file = tmp_path / "plan.json"
        file.write_text(text)
        with pytest.raises(BudgetError) as refused:
            Plan.load(file)
        assert str(file) in refused.value.message
        assert "\n" not in str(refused.value)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for path in (tmp_path / "binary", tmp_path / "absent", tmp_path):
        with pytest.raises(BudgetError):
            Plan.load(path)


def places_in(value, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_in(inner, (*path, key))


OTHERS = (
    None,
    True,
    -1,
    0,
    1,
    10**30,
    0.5,
    math.nan,
    math.inf,
    "",
    "dense",
    "svd",
    "model.layers.0.mlp",
    [],
    [[]],
    {},
    {"a": [1]},
)


def mutated(raw, rng):
    """The same with one value replaced, removed, doubled or renamed."""
    raw = json.loads(json.dumps(raw))
    *path, last = rng.choice(list(places_in(raw))[1:])
    parent = raw
    for key in path:
        parent = parent[key]
    kind = rng.choice(["replace", "replace", "replace", "remove", "double", "rename"])
    if kind == "replace":
        parent[last] = rng.choice(OTHERS)
    elif kind == "remove":
        del parent[last]
    elif isinstance(parent, list):
        parent.insert(last, parent[last])
    else:
        parent[f"{last}s"] = parent[last] if kind == "double" else parent.pop(last)
    return raw


@pytest.mark.parametrize("name", KINDS)
def test_a_mutated_plan_is_refused_on_reading_or_before_the_model_is_changed_or_is_a_plan(plans, statistics, tmp_path, name):
    """200 mutations in all, of every kind of edit: never anything but a line that says what is wrong."""
    rng, file = random.Random(f"mutations of {name}"), tmp_path / "plan.json"
    dense, refused, done = tiny_model().state_dict(), 0, 0
    for _ in range(50):
        file.write_text(json.dumps(mutated(plans[name].to_dict(), rng)))
        try:
            made = Plan.load(file)
        except BudgetError as problem:
            refused += 1
            assert str(file) in problem.message
            assert "\n" not in str(problem)
            continue
        model = tiny_model()
        try:
            carry_out(model, statistics, made)
        except FascError as problem:
            assert "\n" not in str(problem)
            assert_same(model.state_dict(), dense)
            continue
        done += 1
        assert str(made)
        assert json.dumps(made.to_dict(), allow_nan=False)
        assert json.dumps(model.config.to_dict())
    assert refused > 20
    assert done


def test_a_truncated_plan_is_refused(plans, tmp_path):
    whole = plans["fasc"].save(tmp_path / "whole.json").read_bytes().rstrip()
    rng, file = random.Random("cuts"), tmp_path / "plan.json"
    for end in sorted(rng.sample(range(len(whole)), 50)):
        file.write_bytes(whole[:end])
        with pytest.raises(BudgetError):
            Plan.load(file)


def test_a_plan_of_another_model_is_refused_before_anything_is_changed(plans, statistics):
    other = tiny_model("qwen3")
    before = {key: value.clone() for key, value in other.state_dict().items()}
    made = plans["fasc"]
    stranger = made.edits[-1].model_copy(update={"layers": ("model.layers.7.mlp.up_proj",), "d_outs": (48,), "biases": (False,)})
    for wrong in (made.with_edits([*made.edits, stranger]), made.with_edits([*made.edits, made.edits[-1]])):
        with pytest.raises(FascError):
            carry_out(other, statistics, wrong)
        assert_same(other.state_dict(), before)


@pytest.mark.parametrize("name", KINDS)
def test_what_no_edit_names_stays_as_it_is(plans, statistics, name):
    """Not a copy: the very parameters of the dense model."""
    model, made = tiny_model(), plans[name]
    before = dict(model.named_parameters())
    values = {key: value.detach().clone() for key, value in before.items()}
    carry_out(model, statistics, made)
    touched = {layer for edit in made.edits for layer in edit.touches}
    assert touched <= {layer.name for layer in made.layers}
    others = [key for key in before if key.rpartition(".")[0] not in touched]
    assert len(others) >= 6, "embeddings and norms at least"
    after = dict(model.named_parameters())
    for key in others:
        assert after[key] is before[key]
        assert torch.equal(after[key], values[key])
    for layer in touched:
        assert not torch.equal(after.get(f"{layer}.weight", torch.empty(0)), values[f"{layer}.weight"])


def test_layers_that_were_not_chosen_are_in_no_edit_and_in_no_total(statistics):
    whole = plan(tiny_model(), statistics, param_fraction=0.6)
    some = plan(tiny_model(), statistics, param_fraction=0.6, exclude=("*down_proj", "*.0.self_attn.*"))
    names = {layer.name for layer in some.layers}
    assert names < {layer.name for layer in whole.layers}
    assert not any("down_proj" in name or ".0.self_attn." in name for name in names)
    assert {layer for edit in some.edits for layer in edit.touches} <= names
    assert some.dense_parameters == sum(layer.parameters for layer in some.layers)
    assert some.totals["param_fraction"] == pytest.approx(0.6, abs=0.01)
    assert some.totals["model_fraction"] > whole.totals["model_fraction"]
