"""Every kind of edit writes itself to JSON and is read as it was."""

import json
import math

import pytest

from fasc.edits import EDITS, read_edit
from fasc.errors import FascError
from tests.edits.kinds import KINDS, MADE, UNFUSE


def test_there_is_an_example_of_every_kind():
    assert {edit.edit for edit in (*KINDS.values(), UNFUSE)} == set(EDITS)


@pytest.mark.parametrize(
    "edit", [*KINDS.values(), *MADE, UNFUSE], ids=lambda edit: f"{edit.edit} of {edit.touches[0].rpartition('.')[2]}"
)
def test_an_edit_is_read_as_it_was_written(edit):
    raw = json.loads(json.dumps(edit.to_dict(), allow_nan=False))
    assert read_edit(raw, "here") == edit
    assert type(read_edit(raw, "here")) is type(edit)
    assert read_edit(raw, "here").to_dict() == edit.to_dict()
    assert read_edit(edit.with_loss(0.25).to_dict(), "here").predicted_loss == 0.25


def refused(raw):
    with pytest.raises(FascError) as problem:
        read_edit(raw, "plan.json, edit 3")
    assert problem.value.message.startswith("plan.json, edit 3: ")
    assert "\n" not in str(problem.value)
    return problem.value.message


@pytest.mark.parametrize(
    "raw", [None, 5, "factor", [], {}, {"edit": None}, {"edit": []}, {"edit": {}}, {"edit": "cut"}, {"edit": 7}], ids=str
)
def test_what_is_no_edit_is_refused_and_the_known_kinds_are_named(raw):
    assert "unknown edit" in refused(raw)


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_that_is_always_needed_may_be_missing_and_none_may_be_added(kind):
    raw = KINDS[kind].to_dict()
    needed = [name for name, field in type(KINDS[kind]).model_fields.items() if field.is_required() and name != "edit"]
    assert needed
    for name in needed:
        assert f"`{name}" in refused({key: value for key, value in raw.items() if key != name})
    assert "no such field" in refused({**raw, "ranks": 3})


NUMBERS = {
    "factor": ("d_in", "rank"),
    "narrow": ("channels", "width"),
    "mask": ("d_in", "d_out"),
    "remove": ("parts", "count"),
    "heads": ("heads", "count"),
    "values": ("heads", "width", "size"),
}


@pytest.mark.parametrize("kind,name", [(kind, name) for kind, names in NUMBERS.items() for name in names])
@pytest.mark.parametrize("value", [0, -3, 2.5, "many", None, [8], math.nan, math.inf], ids=str)
def test_sizes_are_whole_numbers_above_zero(kind, name, value):
    assert f"`{name}" in refused({**KINDS[kind].to_dict(), name: value})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, "small"], ids=str)
def test_a_forecast_is_a_finite_number_that_is_not_negative(kind, value):
    assert "`predicted_loss`" in refused({**KINDS[kind].to_dict(), "predicted_loss": value})


@pytest.mark.parametrize("name", ["layers", "d_outs", "biases"])
def test_a_unit_has_a_width_and_a_bias_for_each_layer(name):
    raw = KINDS["factor"].to_dict()
    assert "do not fit" in refused({**raw, name: raw[name][:-1]})
    assert "do not fit" in refused({**raw, "layers": [], "d_outs": [], "biases": []})


@pytest.mark.parametrize("kind", ["narrow", "remove", "heads", "values"])
@pytest.mark.parametrize(
    "shape",
    [[], ["a"], ["a", 0, 8, False], ["a", 8, -8, False], ["a", 8, 8, "maybe"], [5, 8, 8, False], ["a", 8, 8, False, 1], None],
    ids=str,
)
def test_the_shape_of_a_layer_is_its_name_two_sizes_and_whether_it_has_a_bias(kind, shape):
    refused({**KINDS[kind].to_dict(), "consumer": shape})
    refused({**KINDS[kind].to_dict(), "producers": [shape]})
