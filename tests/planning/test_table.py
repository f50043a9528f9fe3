"""A printed plan names every edit with its numbers, and the totals are those of the plan."""

import pytest

import fasc
from fasc.edits.factor import Factor
from fasc.planning import table
from fasc.planning.experts import experts_in
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


def test_experts_have_a_row_each_and_one_per_block_where_they_are_many(mixture, tokens, monkeypatch):
    moments = fasc.collect(mixture, corpus=tokens, sequences=24, sequence_length=20)
    made = plan(mixture, moments, param_fraction=0.6, layouts="dense,experts,factors,channels", damping=1e-2)
    touched = {name for edit in made.edits[1:] for name in edit.touches}
    assert made.edits[0].edit == "unfuse" and f"{len(made.layers) - len(touched)} of {len(made.layers)} layers untouched" in str(
        made
    )
    experts = experts_in(made)
    rows = {tuple(line.split()[:2]): line for line in str(made).split("experts\n")[-1].splitlines() if line.strip()}
    assert len(experts) == 8
    for one in experts.values():
        row = rows[str(one.block), str(one.expert)]
        assert one.words() in row and f"{one.kept:.1%}" in row
    assert not [line for line in str(made).splitlines() if "skip" in line.split()[:1] and ".experts." in line]
    monkeypatch.setattr(table, "_MANY", 7)
    text = str(made)
    for block in (0, 1):
        ones = [one for one in experts.values() if one.block == block]
        counts = [len(ones), sum(one.is_dense for one in ones), sum(one.dropped for one in ones)]
        (row,) = [line for line in text.splitlines() if line.split()[:4] == [str(block), *map(str, counts)]]
        assert f"{1 - sum(one.saved for one in ones) / sum(one.parameters for one in ones):.1%}" in row
