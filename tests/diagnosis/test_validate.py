"""Validation measures what it says: the divergence of the model with one group, or the whole plan, compressed."""

import pytest
import torch

from fasc.compression.compress import carry_out
from fasc.diagnosis.diagnose import diagnosis_needs
from fasc.diagnosis.validate import held_out_moments, summarise, validate, validate_plans
from fasc.layouts import LAYOUTS
from fasc.methods import METHODS
from fasc.planning.needs import needs_for
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from fasc.statistics.options import CalibrationConfig
from tests.conftest import tiny_model

BOTH = (MethodConfig(name="fasc", damping=1e-3), MethodConfig(name="svd"))


@pytest.fixture(scope="module")
def statistics(tokens):
    needs = diagnosis_needs(BOTH) | needs_for(BOTH[0], BudgetConfig(param_fraction=0.6))
    return collect_moments(tiny_model(), tokens, needs)


@pytest.fixture
def held_out():
    return torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(5))


def log_probabilities(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits.double().log_softmax(-1)


def divergence(p, q):
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_row_is_the_divergence_of_the_model_with_that_group_alone_compressed(statistics, held_out):
    model = tiny_model()
    rows = validate(model, statistics, held_out, BOTH, [0.25, 0.75])
    assert len(rows) == 8 * 2 * 2
    row = next(r for r in rows if r["group"].endswith("1.mlp.down_proj") and r["method"] == "fasc" and r["rank_fraction"] == 0.25)
    small = tiny_model()
    method = MethodConfig(name="fasc", damping=1e-3, layouts=("factors",))
    made = plan(small, statistics, method=method, rank_fraction=0.25, include=("*.1.mlp.down_proj",))
    assert len(made.edits) == 1
    carry_out(small, statistics, made)
    expected = divergence(log_probabilities(model, held_out), log_probabilities(small, held_out))
    assert row["kl"] == pytest.approx(expected, rel=1e-3)


def test_the_summary_says_how_well_each_forecast_orders_the_groups(statistics, held_out):
    summary = summarise(validate(tiny_model(), statistics, held_out, BOTH, [0.25, 0.75]))
    forecasts = {one["forecast"] for one in summary}
    assert forecasts == {"½J → KL", "rho → log KL gain", "rho_debiased → log KL gain", "J gain → KL gain"}
    whole = next(
        one for one in summary if one["forecast"] == "½J → KL" and one["method"] == "fasc" and one["rank_fraction"] is None
    )
    assert whole["n"] == 16
    assert whole["pearson"] > 0.5, "½J orders the groups of a random model, too"


def test_the_summary_of_numbers_that_are_known():
    """KL is twice the forecast for one method and three times for the other: ratios and correlations are exact."""
    rows = [
        {"group": f"g{i}", "rank_fraction": 0.5, "method": name, "half_j": size * i, "kl": factor * size * i, "rho": 0.1 * i}
        | {"rho_debiased": None}
        for name, size, factor in (("fasc", 1.0, 2.0), ("svd", 2.0, 3.0))
        for i in range(1, 6)
    ]
    summary = {(row["forecast"], row["method"], row["rank_fraction"]): row for row in summarise(rows)}
    assert summary["½J → KL", "fasc", None]["median_ratio"] == pytest.approx(2)
    assert summary["½J → KL", "svd", 0.5]["median_ratio"] == pytest.approx(3)
    assert summary["½J → KL", "svd", 0.5]["pearson"] == pytest.approx(1)
    gain = summary["J gain → KL gain", "fasc over svd", None]
    assert (gain["share_better"], gain["median_ratio"]) == (1, pytest.approx(1.5))
    assert gain["pearson"] is None, "all gains are the same: nothing to correlate"
    assert ("rho_debiased → log KL gain", "fasc over svd", None) not in summary


def test_validation_of_a_whole_plan_is_that_of_the_compressed_model(statistics, held_out, tokens):
    model, options = tiny_model(), MethodConfig(damping=1e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    budgets = [BudgetConfig(param_fraction=fraction, rank_multiple=1) for fraction in (0.6, 0.9)]
    same = held_out_moments(model, statistics, tokens, CalibrationConfig(batch_tokens=160))
    row, milder = validate_plans(model, statistics, held_out, options, budgets, held_out=same)
    assert row["half_j_held_out"] == pytest.approx(row["half_j"], rel=0.02), "moments of the same tokens say the same"
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert row["half_j"] > milder["half_j"] > 0
    whole = tiny_model()
    done = carry_out(whole, statistics, plan(whole, statistics, method=options, param_fraction=0.6, rank_multiple=1))
    assert row["half_j"] == pytest.approx(done.predicted_loss)
    p, q = log_probabilities(model, held_out), log_probabilities(whole, held_out)
    assert row["kl"] == pytest.approx(divergence(p, q), rel=1e-3)
    taken = (p - q)[:, :-1].gather(-1, held_out[:, 1:, None])
    assert row["nll_increase"] == pytest.approx(float(taken.mean()), rel=1e-3)


def test_by_block_all_groups_of_a_block_are_compressed_at_once_and_scored_while_they_are(statistics, held_out):
    model = tiny_model()
    seen = []

    def look():
        seen.append(log_probabilities(model, held_out))
        return {"kept": len(seen)}

    dense = log_probabilities(model, held_out)
    rows = validate(model, statistics, held_out, BOTH, [0.5], by="block", look=look)
    assert [(row["group"], row["method"], row["kept"]) for row in rows] == [
        ("block 0", "fasc", 1),
        ("block 0", "svd", 2),
        ("block 1", "fasc", 3),
        ("block 1", "svd", 4),
    ]
    for row, compressed in zip(rows, seen, strict=True):
        assert row["kl"] == pytest.approx(divergence(dense, compressed), rel=1e-3)
        small = tiny_model()
        layout = next(name for name, one in LAYOUTS.items() if one.asks_for == METHODS[row["method"]].scope)
        method = MethodConfig(name=row["method"], damping=1e-3, layouts=(layout,))
        made = plan(small, statistics, method=method, rank_fraction=0.5, include=(f"*.{row['block']}.*",))
        halves = [edit.model_copy(update={"rank": edit.unit.full_rank // 2}) for edit in made.edits]
        carry_out(small, statistics, made.with_edits(halves))
        assert row["kl"] == pytest.approx(divergence(dense, log_probabilities(small, held_out)), rel=1e-3)
    assert torch.equal(log_probabilities(model, held_out), dense)
