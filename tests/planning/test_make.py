"""What a budget buys: what is asked for is kept, more budget never loses more, and each rule of a budget holds."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import fasc
from fasc.compression.compress import carry_out
from fasc.edits.factor import Factor
from fasc.edits.narrow import Narrow
from fasc.errors import BudgetError, FascError, StatisticsError
from fasc.planning.options import BudgetConfig
from fasc.stages.plan import plan
from tests.conftest import tiny_model
from tests.planning.stored import stored_numbers


def factored(made):
    return [edit for edit in made.edits if isinstance(edit, Factor)]


@pytest.fixture(scope="module")
def wide(tokens):
    """A model wide enough for a step of one rank to be below half a percent, and its moments."""

    def model():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return AutoModelForCausalLM.from_config(config).eval()

    return model, fasc.collect(model(), corpus=tokens)


@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
@pytest.mark.parametrize("budget", [{"param_fraction": 0.8}, {"param_fraction": 0.5}, {"model_fraction": 0.8}], ids=str)
def test_a_fraction_of_the_parameters_is_met_and_never_exceeded(wide, budget, allocation):
    model, statistics = wide[0](), wide[1]
    made = plan(model, statistics, allocation=allocation, damping=1e-2, **budget)
    carry_out(model, statistics, made)
    assert stored_numbers(model) == made.totals["parameters"]
    ((kind, target),) = budget.items()
    assert 0.995 * target <= made.totals[kind] <= target


@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_no_larger_than_the_bytes_asked_for_and_its_header_no_larger_than_forecast(
    wide, tokenizer, tmp_path, allocation, dtype
):
    model, statistics = wide[0]().to(dtype), wide[1]
    limit = int(0.8 * dtype.itemsize * model.num_parameters())
    made = plan(model, statistics, allocation=allocation, damping=1e-2, max_bytes=limit)
    small = carry_out(model, statistics, made)
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert made.totals["bytes"] < size <= made.totals["bytes"] + made.model.header_bytes
    assert size <= limit
    assert made.totals["bytes"] + made.model.header_bytes > 0.995 * limit
    assert small.totals["bytes"] == made.totals["bytes"]


def test_a_rank_fraction_is_the_share_of_every_units_full_rank(wide):
    model, statistics = wide[0](), wide[1]
    made = plan(model, statistics, rank_fraction=0.5)
    assert made.totals["rank_fraction"] == pytest.approx(0.5, abs=0.01)
    assert made.totals["rank_fraction"] <= 0.5
    for edit in made.edits:
        assert edit.rank / edit.unit.full_rank == pytest.approx(0.5, abs=0.02)


def test_more_budget_never_loses_more_and_a_global_allocation_never_more_than_a_uniform_one(statistics):
    losses = []
    for fraction in (0.5, 0.6, 0.7, 0.8, 0.9):
        losses.append(plan(tiny_model(), statistics, param_fraction=fraction).predicted_loss)
        even = plan(tiny_model(), statistics, allocation="uniform", param_fraction=fraction)
        assert losses[-1] <= even.predicted_loss + 1e-12
    assert losses == sorted(losses, reverse=True)


def test_a_budget_in_losses_gives_the_smallest_model_within(statistics):
    by_kl = plan(tiny_model(), statistics, max_kl=0.05)
    assert by_kl.predicted_loss <= 0.05
    smaller = plan(tiny_model(), statistics, param_fraction=by_kl.totals["param_fraction"] * 0.99)
    assert smaller.predicted_loss > 0.05
    by_percent = plan(tiny_model(), statistics, max_perplexity_increase="5%")
    assert by_percent.predicted_loss <= np.log(1.05) + 1e-12
    even = plan(tiny_model(), statistics, allocation="uniform", max_kl=0.05)
    assert even.predicted_loss <= 0.05
    assert even.totals["parameters"] >= by_kl.totals["parameters"]


@pytest.mark.parametrize("name", ["svd", "whitened"])
def test_energies_without_a_common_unit_are_not_compared_across_layers(statistics, name):
    with pytest.raises(BudgetError, match="differs from layer to layer"):
        plan(tiny_model(), statistics, method=name, allocation="fisher", param_fraction=0.8)
    assert plan(tiny_model(), statistics, method=name, param_fraction=0.8).allocation == "uniform"


def test_without_statistics_a_fraction_can_be_had_and_a_forecast_cannot():
    made = plan(tiny_model(), param_fraction=0.8)
    assert made.allocation == "uniform"
    assert made.predicted_loss is None
    with pytest.raises(BudgetError, match="no statistics"):
        plan(tiny_model(), max_kl=0.1)
    with pytest.raises(BudgetError, match="no statistics"):
        plan(tiny_model(), allocation="fisher", param_fraction=0.8)


@pytest.mark.parametrize("name", ["fasc", "svd", "two-sided"])
def test_statistics_of_a_method_are_enough_for_every_budget(tokens, name):
    statistics = fasc.collect(tiny_model(), corpus=tokens, methods=name)
    for budget in (
        {"rank_fraction": 0.5},
        {"param_fraction": 0.7},
        {"model_fraction": 0.8},
        {"max_bytes": "70kB"},
        {"max_kl": 0.05},
        {"max_perplexity_increase": "5%"},
        {"max_kl": 0.05, "allocation": "uniform"},
    ):
        model = tiny_model()
        made = plan(model, statistics, method=name, **budget)
        assert made.predicted_loss > 0
        carry_out(model, statistics, made)


def test_moments_that_are_missing_are_named(tokens):
    statistics = fasc.collect(tiny_model(), corpus=tokens, methods="svd")
    with pytest.raises(StatisticsError, match="gradient per"):
        plan(tiny_model(), statistics, param_fraction=0.8)


def test_the_fisher_plan_chooses_between_shared_and_separate(statistics):
    kinds = set()
    for fraction in (0.2, 0.35, 0.5, 0.8):
        made = plan(tiny_model(), statistics, param_fraction=fraction)
        kinds |= {len(edit.layers) > 1 for edit in factored(made)}
        names = [name for edit in factored(made) for name in edit.layers]
        assert len(names) == len(set(names))
    assert kinds == {True, False}


def test_a_method_of_single_layers_shares_nothing_and_a_layout_can_restrict_the_others(statistics):
    two_sided = plan(tiny_model(), statistics, method="two-sided", param_fraction=0.5)
    assert factored(two_sided)
    assert all(len(edit.layers) == 1 for edit in factored(two_sided))
    shared = plan(tiny_model(), statistics, layouts="dense,shared", param_fraction=0.6)
    assert {edit.layout for edit in factored(shared)} == {"shared", "factors"}
    assert all(len(edit.layers) > 1 or "+" not in edit.group for edit in factored(shared))


def shares_left(made):
    """Of each layer or unit, what is left of the parameters it had before anything was done to it."""
    dense = {layer.name: layer.parameters for layer in made.layers}
    left = dict(dense)
    for edit in made.edits:
        if isinstance(edit, Narrow):
            left |= {layer.name: layer.parameters for layer in edit._left()}
    units = {edit.layers: edit.unit.parameters - edit.saved for edit in factored(made)}
    units |= {(name,): size for name, size in left.items() if not any(name in layers for layers in units)}
    return [size / sum(dense[name] for name in layers) for layers, size in units.items()]


def test_a_floor_is_kept_by_every_layer(statistics):
    assert min(shares_left(plan(tiny_model(), statistics, param_fraction=0.5, floor=0.35))) >= 0.35
    assert min(shares_left(plan(tiny_model(), statistics, param_fraction=0.5))) < 0.35


def test_the_dearer_a_product_the_fewer_are_made_and_the_budget_is_the_same(statistics):
    plans = [plan(tiny_model(), statistics, param_fraction=0.8, overhead=overhead) for overhead in (0, 200, 1_000, 10**9)]
    counts = [len(factored(made)) for made in plans]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > 0, "some are needed to keep the budget"
    losses = [made.predicted_loss for made in plans]
    assert losses == pytest.approx(sorted(losses))
    assert losses[0] < losses[2]
    assert all(made.parameters <= 0.8 * made.dense_parameters for made in plans)


@pytest.mark.parametrize("kind", ["max_bytes", "max_kl", "model_fraction"])
def test_an_overhead_counts_under_every_budget_but_a_rank(statistics, kind):
    reached = plan(tiny_model(), statistics, param_fraction=0.8)
    asked = {"max_bytes": reached.totals["bytes"] + reached.model.header_bytes, "max_kl": reached.predicted_loss}
    budget = {kind: asked.get(kind, reached.totals["model_fraction"])}
    plain, counted = (plan(tiny_model(), statistics, **budget, overhead=overhead) for overhead in (0, 10**7))
    assert len(factored(counted)) < len(factored(plain))
    if kind == "max_kl":
        assert counted.predicted_loss <= reached.predicted_loss
    ranks = [plan(tiny_model(), statistics, rank_fraction=0.5, overhead=overhead).edits for overhead in (0, 10**7)]
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize(
    "budget,message",
    [({"param_fraction": 0.001}, "smallest possible plan"), ({"max_bytes": "10kB"}, "not touched")],
    ids=["fraction", "bytes"],
)
def test_impossible_budgets_say_what_is_possible(statistics, budget, message):
    with pytest.raises(BudgetError, match=message):
        plan(tiny_model(), statistics, **budget)


def test_a_carried_out_plan_loses_what_it_forecast(statistics):
    model = tiny_model()
    made = plan(model, statistics, param_fraction=0.7)
    assert carry_out(model, statistics, made).predicted_loss == pytest.approx(made.predicted_loss, rel=1e-9)
    made = plan(tiny_model(), statistics, method="svd", param_fraction=0.7)
    blank = made.with_edits([edit.with_loss(None) for edit in made.edits])
    assert blank.predicted_loss is None
    assert carry_out(tiny_model(), statistics, blank).predicted_loss == pytest.approx(made.predicted_loss, rel=1e-9)


def test_held_out_moments_must_be_of_other_text_and_forecast_more(statistics, tokens):
    with pytest.raises(StatisticsError, match="very tokens that calibrate"):
        plan(tiny_model(), statistics, param_fraction=0.7, held_out=statistics)
    other = fasc.collect(tiny_model(), corpus=(tokens + 1).clamp(max=127))
    seen = plan(tiny_model(), statistics, layouts="dense,factors", param_fraction=0.7)
    unseen = plan(tiny_model(), statistics, layouts="dense,factors", param_fraction=0.7, held_out=other)
    assert unseen.predicted_loss > seen.predicted_loss


def test_unknown_options_and_two_budgets_are_refused(statistics):
    for wrong in ({"param_fractoin": 0.5}, {"param_fraction": 0.5, "max_kl": 0.1}, {"param_fraction": 1.5}):
        with pytest.raises(FascError):
            plan(tiny_model(), statistics, **wrong)


def test_the_budget_asked_for_stands_in_the_plan(statistics):
    made = plan(tiny_model(), statistics, param_fraction=0.7, floor=0.1)
    assert BudgetConfig.model_validate(made.budget) == BudgetConfig(param_fraction=0.7, floor=0.1)
