"""The heat maps of experts: every expert a cell, in the numbers of the diagnosis and of the plan."""

import pytest
import torch

import fasc
from fasc.diagnosis.diagnose import diagnosis_needs
from fasc.edits.skip import Skip
from fasc.planning.experts import experts_in
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.reporting.entries import Entry
from fasc.reporting.page.cells import fields_of
from fasc.reporting.page.sources import Model, Source

OPTIONS = MethodConfig(damping=1e-2)


@pytest.fixture
def fields(mixture, tokens):
    with torch.no_grad():
        mixture.get_submodule("model.layers.0.mlp.experts").down_proj[2] *= 1e-4
    needs = diagnosis_needs([OPTIONS]) | needs_for(OPTIONS, None)
    statistics = fasc.collect(mixture, corpus=tokens, needs=needs, sequences=24, sequence_length=20)
    made = fasc.plan(mixture, statistics, param_fraction=0.6, layouts="dense,experts,factors,channels", damping=1e-2)
    found = fasc.diagnose(mixture, statistics, "fasc", plan=made)
    source = Source("run", diagnosis={"groups": found.rows, "experts": found.experts, "meta": found.meta})
    model = Model("small", "run", Entry("small", (), ()), made)
    return {one.name: one for one in fields_of([source], [model])}, found.experts, made


def test_every_expert_is_a_cell_of_what_was_found_and_of_what_the_plan_leaves(fields):
    known, experts, made = fields
    rho = {(block, kind): value for block, kind, value, _ in known["expert-rho"].subjects["run"]}
    kept = {(block, kind): (value, words) for block, kind, value, words in known["expert-kept"].subjects["small"]}
    loss = {(block, kind): value for block, kind, value, _ in known["expert-loss"].subjects["run"]}
    assert len(rho) == len(kept) == len(loss) == 8
    for one in experts:
        place = one["block"], f"expert {one['expert']}"
        assert rho[place] == pytest.approx(sum(one["rho"].values()) / 2, rel=1e-3)
        assert loss[place] == pytest.approx(one["predicted_loss"]["fasc"], rel=1e-3)
        assert kept[place][0] == pytest.approx(one["kept"], rel=1e-3)
        assert one["left"] in kept[place][1]
    assert any(isinstance(edit, Skip) for edit in made.edits)


def test_an_expert_that_goes_is_no_sublayer_and_channels_are_those_of_all_others(fields):
    known, _, made = fields
    parts = known["parts"].subjects["small"] if "parts" in known else []
    assert not [kind for _, kind, _, _ in parts if kind == "sublayers"]
    narrowed = [one for one in experts_in(made).values() if one.width < one.channels]
    for block in {one.block for one in narrowed}:
        ones = [one for one in experts_in(made).values() if one.block == block and not one.dropped]
        (words,) = [words for where, kind, _, words in parts if (where, kind) == (block, "expert channels")]
        assert words == f"{sum(one.width for one in ones):,} of {sum(one.channels for one in ones):,}"
