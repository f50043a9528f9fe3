"""A printed plan names every edit with its numbers, and the totals are those of the plan."""

import pytest

from fasc.edits.factor import Factor
from fasc.stages.plan import plan
from tests.conftest import tiny_model


@pytest.mark.parametrize("name", ["fasc", "svd", "magnitude", "llm-pruner"])
def test_every_edit_has_a_row_and_the_totals_are_the_plans(statistics, name):
    made = plan(tiny_model(), statistics, method=name, param_fraction=0.6)
    lines = str(made).splitlines()
    for edit in made.edits:
        layers = edit.unit.name if isinstance(edit, Factor) else edit.touches[-1]
        (row,) = [line for line in lines if line.split()[:2] == [edit.edit, layers]]
        assert f"{edit.saved:,}" in row
        assert edit.predicted_loss is None or row.endswith(f"{edit.predicted_loss:.5f}")
    text = "\n".join(lines)
    assert f"{made.totals['parameters']:,} ({made.totals['model_fraction']:.1%} of dense)" in text
    untouched = len(made.layers) - len({layer for edit in made.edits for layer in edit.touches})
    assert f"{untouched} of {len(made.layers)} layers untouched" in text
    outside = made.model.parameters - made.dense_parameters
    assert f"{outside:,} parameters" in text
    assert ("forecast, Σ ½J" in text) == (made.predicted_loss is not None)
