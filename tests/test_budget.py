"""Budgets: what is asked for is kept, the allocator is as good as brute force, layouts cost what they say."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fasc import pipeline
from fasc.layouts.accounting import pivoted_parameters, stored_parameters
from fasc.planning.candidates import Candidates, Rules, Way, candidates, unit_of
from fasc.planning.lagrangian import allocate_by_loss
from fasc.planning.plan import ChannelCut, RankPlan, UnitPlan
from fasc.planning.uniform import allocate_uniformly
from fasc.statistics.collect import collect
from fasc.compression.compress import compress
from fasc.planning.make import needs_for
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.errors import BudgetError
from fasc.linalg.pivot import pivoted_form
from fasc.methods import METHODS
from fasc.layouts.lowrank import PivotedLinear
from tests.conftest import tiny_model

EVERYTHING = frozenset().union(*(method.needs_in(method.scopes) for method in METHODS.values()))


@pytest.fixture(scope="module")
def statistics(tokens):
    return collect(tiny_model(), tokens, EVERYTHING)


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens).logits


def stored_numbers(model):
    """Everything a checkpoint would hold: parameters once, and the orders of pivoted layers."""
    orders = [buffer for name, buffer in model.named_buffers() if name.endswith(".order")]
    return sum(tensor.numel() for tensor in (*model.parameters(), *orders))


@pytest.mark.parametrize("shape", [(12, 5), (7, 7), (20, 1), (9, 3)])
def test_a_pivoted_form_is_lossless_and_its_coefficients_are_bounded(shape):
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(shape, generator=generator, dtype=torch.float64)
    form = pivoted_form(up)
    assert sorted([*form.pivots.tolist(), *form.others.tolist()]) == list(range(shape[0]))
    torch.testing.assert_close(form.coefficients @ up[form.pivots], up[form.others], rtol=0, atol=1e-10)
    assert form.coefficients.numel() == 0 or form.coefficients.abs().max() < 2 ** shape[1]
    assert form.coefficients.numel() == 0 or form.coefficients.abs().max() < 10, "pivoting keeps them small in practice"


def test_dependent_columns_are_no_problem():
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(9, 2, generator=generator, dtype=torch.float64) @ torch.randn(2, 4, generator=generator, dtype=torch.float64)
    form = pivoted_form(up)
    assert torch.isfinite(form.coefficients).all()
    torch.testing.assert_close(form.coefficients @ up[form.pivots], up[form.others], rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layouts", list(itertools.product(("shared", "factors"), ("pivoted", "pivoted-columns"))))
def test_the_pivoted_layout_is_lossless(statistics, tokens, dtype, layouts):
    """The same ranks as two factors and as pivots: the same logits, to the precision of the weights."""
    outputs = []
    for allowed in (layouts, layouts[:1]):
        model = tiny_model(dtype=dtype)
        options = MethodConfig(allocation="uniform", layouts=(*allowed, "merged"))
        plan = pipeline.plan(model, options, BudgetConfig(rank_fraction=0.4), statistics=statistics)
        assert {unit.layout for unit in plan.units} <= {allowed[-1], "factors", "merged"}
        compress(model, statistics, plan, options)
        outputs.append(logits(model, tokens).float())
    scale = outputs[1].norm()
    assert (outputs[0] - outputs[1]).norm() / scale < (1e-5 if dtype == torch.float32 else 0.06)


def test_pivots_of_a_shared_group_are_taken_over_all_members(statistics):
    model = tiny_model()
    options = MethodConfig(layouts=("shared", "pivoted"), allocation="uniform")
    compress(model, statistics, pipeline.plan(model, options, BudgetConfig(rank_fraction=0.5), statistics=statistics), options)
    attention = model.model.layers[0].self_attn
    members = [attention.q_proj, attention.k_proj, attention.v_proj]
    assert all(isinstance(m, PivotedLinear) for m in members)
    own = [m.stop - m.start for m in members]
    assert sum(own) == members[0].rank == 16
    assert min(own) < max(own)
    assert attention.q_proj.down.weight.shape == (16, 32)


def test_columns_are_kept_where_that_is_cheaper_and_each_layer_stays_lossless(statistics):
    """A wide layer's inputs are fewer than its outputs, so their order is cheaper; the weight is the one of two factors."""
    weights = {}
    for layouts in (("factors",), ("factors", "pivoted", "pivoted-columns")):
        model = tiny_model()
        options = MethodConfig(name="two-sided", layouts=(*layouts, "merged"), allocation="uniform")
        plan = pipeline.plan(model, options, BudgetConfig(rank_fraction=0.4), statistics=statistics)
        compress(model, statistics, plan, options)
        weights[layouts] = {unit.unit: model.get_submodule(unit.unit) for unit in plan.units}
    chosen = {unit.unit: unit.layout for unit in plan.units if unit.layout != "merged"}
    wide = {unit.unit: unit.d_in <= unit.d_out for unit in plan.units if unit.layout != "merged"}
    assert set(chosen.values()) == {"pivoted", "pivoted-columns"}
    assert all((chosen[name] == "pivoted-columns") == wide[name] for name in chosen)
    plain, pivoted = weights.values()
    for name in chosen:
        torch.testing.assert_close(pivoted[name].weight, plain[name].weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(pivoted[name].bias, plain[name].bias, rtol=0, atol=1e-5)
    columns = pivoted["model.layers.0.mlp.gate_proj"]
    rank = columns.rank
    assert columns.down.weight.shape == (rank, columns.in_features - rank)
    kept = columns.down.order[:rank]
    torch.testing.assert_close(columns.weight[:, kept], columns.up.weight, msg="these columns are kept as they are")


@pytest.mark.parametrize("layout", ["factors", "pivoted", "pivoted-columns"])
def test_layouts_cost_what_the_formulas_say(statistics, layout):
    model = tiny_model()
    options = MethodConfig(name="two-sided", layouts=(layout,), allocation="uniform")
    plan = pipeline.plan(model, options, BudgetConfig(param_fraction=0.7), statistics=statistics)
    for unit in plan.units:
        if unit.layout == "pivoted":
            assert unit.parameters == unit.rank * (unit.d_in + unit.d_out) - unit.rank**2 + 2 * unit.d_out
        elif unit.layout == "pivoted-columns":
            assert unit.parameters == unit.rank * (unit.d_in + unit.d_out) - unit.rank**2 + unit.d_out + unit.d_in
        elif unit.layout == "factors":
            assert unit.parameters == unit.rank * (unit.d_in + unit.d_out) + unit.d_out
    compress(model, statistics, plan, options)
    assert stored_numbers(model) == plan.totals["parameters"]


def test_pivoted_is_never_larger_than_dense_or_factors():
    for d_in, d_out, rank in itertools.product((8, 24), (8, 64), range(1, 8)):
        assert pivoted_parameters(rank, d_in, d_out) <= min(d_in * d_out, rank * (d_in + d_out))


ASKED = [
    BudgetConfig(param_fraction=0.8),
    BudgetConfig(param_fraction=0.5),
    BudgetConfig(model_fraction=0.8),
    BudgetConfig(max_bytes=100_000),
]


@pytest.mark.parametrize("budget", ASKED, ids=lambda budget: budget.label)
@pytest.mark.parametrize("allocation", ["uniform", "fisher"])
def test_a_budget_is_met_and_never_exceeded(tokens, tokenizer, tmp_path, budget, allocation):
    """A model wide enough for a step of one rank to be below half a percent."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=96, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    if budget.max_bytes is not None:
        budget = BudgetConfig(max_bytes=int(0.8 * 4 * model.num_parameters()))
    needs = METHODS["fasc"].needs_in(("group", "layer"))
    statistics = collect(model, tokens, needs)
    options = MethodConfig(allocation=allocation, damping=1e-2)
    plan = pipeline.plan(model, options, budget, statistics=statistics)
    asked = {"param_fraction": "param_fraction", "model_fraction": "model_fraction"}.get(budget.kind)
    compress(model, statistics, plan, options)
    assert stored_numbers(model) == plan.totals["parameters"]
    if asked:
        target = getattr(budget, budget.kind)
        assert 0.995 * target <= plan.totals[asked] <= target
    else:
        from fasc.model.checkpoint import CheckpointNotes, save_checkpoint

        save_checkpoint(model, tokenizer, tmp_path / "out", CheckpointNotes({}, {}, {}, ""))
        size = (tmp_path / "out" / "model.safetensors").stat().st_size
        assert size <= budget.bytes_limit
        assert plan.totals["bytes"] <= size


def random_candidates(rng, options):
    unit = UnitPlan("u", "g", ("u",), 8, (8,), 8, "dense", 0)
    losses = np.sort(rng.exponential(1, options))[::-1].copy()
    losses[-1] = 0
    return Candidates(unit, np.arange(options), ("factors",) * options, np.sort(rng.uniform(1, 100, options)), losses, 100.0)


def brute_force(groups, limit, limited):
    """The best of all combinations."""
    ways = [
        [
            (
                sum(c.costs[i] for c, i in zip(way.units, pick, strict=True)),
                way.loss + sum(c.losses[i] for c, i in zip(way.units, pick, strict=True)),
            )
            for way in group
            for pick in itertools.product(*(range(len(c.costs)) for c in way.units))
        ]
        for group in groups
    ]
    cost_at, loss_at = (0, 1) if limited == "cost" else (1, 0)
    totals = [
        sum(way[loss_at] for way in ways_taken)
        for ways_taken in itertools.product(*ways)
        if sum(way[cost_at] for way in ways_taken) <= limit
    ]
    return min(totals, default=None)


@pytest.mark.parametrize("limited", ["cost", "loss"])
def test_the_allocator_is_within_half_a_percent_of_brute_force(limited):
    rng = np.random.default_rng(0)
    compared = 0
    for _ in range(40):
        groups = []
        for _ in range(3):
            ways = [Way(tuple(random_candidates(rng, 4) for _ in range(rng.integers(1, 3))))]
            if rng.random() < 0.5:  # one projector for all layers
                ways.insert(0, Way((random_candidates(rng, 5),)))
            for _ in range(rng.integers(0, 3)):  # an MLP with fewer channels, which itself loses something
                cut = ChannelCut("r", ("m",), 8, 4, 10, predicted_loss=float(rng.exponential(0.3)))
                ways.append(Way(tuple(random_candidates(rng, 3) for _ in range(2)), cut))
            groups.append(tuple(ways))
        whole = sum(
            max(
                way.loss * (limited == "loss")
                + sum(float(getattr(c, "costs" if limited == "cost" else "losses").max()) for c in way.units)
                for way in g
            )
            for g in groups
        )
        limit = whole * rng.uniform(0.3, 0.9)
        best = brute_force(groups, limit, limited)
        if best is None:
            with pytest.raises(BudgetError):
                allocate_by_loss(groups, limit, limited=limited)
            continue
        found = allocate_by_loss(groups, limit, limited=limited)
        compared += 1
        assert found.objective <= 1.005 * best + 1e-12
        assert found.lower_bound <= best + 1e-9
    assert compared > 20


@pytest.mark.parametrize("limited", ["cost", "loss"])
def test_with_overheads_no_choice_is_better_in_both_loss_and_overhead(limited):
    """Under a limit on the cost; under one on the loss it is the least cost with overheads, to half a percent."""
    rng = np.random.default_rng(1)
    cheaper = 0
    for _ in range(40):
        menus = [
            replace(random_candidates(rng, 4), overheads=np.array([*rng.choice([0.0, 30.0], 3), 0.0]))
            for _ in range(rng.integers(2, 5))
        ]
        totals = np.array(
            [
                [sum(getattr(m, name)[i] for m, i in zip(menus, pick, strict=True)) for name in ("costs", "losses", "overheads")]
                for pick in itertools.product(*(range(len(m.costs)) for m in menus))
            ]
        )
        limit = rng.uniform(0.4, 0.9) * sum((m.costs if limited == "cost" else m.losses).max() for m in menus)
        kept = totals[totals[:, 0 if limited == "cost" else 1] <= limit]
        if not len(kept):
            continue
        groups = [(Way((menu,)),) for menu in menus]
        found = allocate_by_loss(groups, limit, limited=limited)
        plain = allocate_by_loss([(Way((replace(menu, overheads=None),)),) for menu in menus], limit, limited=limited)
        cost, loss, overhead = (
            [
                sum(getattr(menu, name)[options[0]] for menu, (_, options) in zip(menus, allocation.picks, strict=True))
                for allocation in (found, plain)
            ]
            for name in ("costs", "losses", "overheads")
        )
        assert (cost if limited == "cost" else loss)[0] <= limit * (1 + 1e-9)
        if limited == "loss":
            assert found.objective == pytest.approx(cost[0] + overhead[0])
            assert found.objective <= 1.005 * (kept[:, 0] + kept[:, 2]).min()
        else:
            assert not ((kept[:, 1] < 0.995 * loss[0]) & (kept[:, 2] <= overhead[0])).any()
        assert overhead[0] <= overhead[1] or cost[0] < cost[1] or loss[0] < loss[1]
        cheaper += overhead[0] < overhead[1]
    assert cheaper > 5


def test_concave_costs_are_no_trap():
    """A greedy that pays for one direction at a time stops where the pivoted layout's next directions are almost free."""
    unit = UnitPlan("u", "g", ("u",), 64, (64,), 64, "dense", 0)
    rules = Rules(frozenset({"dense", "pivoted"}))
    losses = np.linspace(1, 0, 65)
    menu = candidates(unit, rules, losses)
    other = candidates(unit, rules, losses)
    limit = 1.25 * menu.costs[-1]
    found = allocate_by_loss([(Way((menu,)),), (Way((other,)),)], limit, limited="cost")
    best = brute_force([(Way((menu,)),), (Way((other,)),)], limit, "cost")
    assert found.objective == pytest.approx(best)
    ranks = sorted(menu.pick(picks[0]).rank for _, picks in found.picks)
    assert ranks[1] == 64
    assert ranks[0] < 16, "one dense and one small beats two of the middle"


def test_more_budget_never_loses_more(statistics):
    losses = []
    for fraction in (0.5, 0.6, 0.7, 0.8, 0.9):
        plan = pipeline.plan(tiny_model(), "fasc", BudgetConfig(param_fraction=fraction), statistics=statistics)
        losses.append(plan.predicted_loss)
        uniform = MethodConfig(allocation="uniform")
        even = pipeline.plan(tiny_model(), uniform, BudgetConfig(param_fraction=fraction), statistics=statistics)
        assert plan.predicted_loss <= even.predicted_loss + 1e-12
    assert losses == sorted(losses, reverse=True)


def test_a_budget_in_losses_gives_the_smallest_model_within(statistics):
    model = tiny_model()
    by_kl = pipeline.plan(model, "fasc", BudgetConfig(max_kl=0.05), statistics=statistics)
    assert by_kl.predicted_loss <= 0.05
    smaller = pipeline.plan(
        model, "fasc", BudgetConfig(param_fraction=by_kl.totals["param_fraction"] * 0.99), statistics=statistics
    )
    assert smaller.predicted_loss > 0.05
    by_percent = pipeline.plan(model, "fasc", BudgetConfig(max_perplexity_increase="5%"), statistics=statistics)
    assert by_percent.predicted_loss <= np.log(1.05) + 1e-12
    even = MethodConfig(allocation="uniform")
    assert pipeline.plan(model, even, BudgetConfig(max_kl=0.05), statistics=statistics).predicted_loss <= 0.05


def test_energies_without_a_common_unit_are_refused(statistics):
    for name in ("svd", "whitened"):
        options = MethodConfig(name=name, allocation="fisher")
        with pytest.raises(BudgetError, match="differs from layer to layer"):
            pipeline.plan(tiny_model(), options, BudgetConfig(param_fraction=0.8), statistics=statistics)
        assert pipeline.plan(tiny_model(), name, BudgetConfig(param_fraction=0.8), statistics=statistics).allocation == "uniform"


def test_a_forecast_cannot_be_had_without_statistics():
    with pytest.raises(BudgetError, match="no statistics"):
        pipeline.plan(tiny_model(), "fasc", BudgetConfig(max_kl=0.1))
    with pytest.raises(BudgetError, match="no statistics"):
        pipeline.plan(tiny_model(), "fasc", BudgetConfig(param_fraction=0.8))


def test_the_fisher_plan_chooses_between_shared_and_separate(statistics):
    kinds = set()
    for fraction in (0.2, 0.35, 0.5, 0.8):
        plan = pipeline.plan(tiny_model(), "fasc", BudgetConfig(param_fraction=fraction), statistics=statistics)
        kinds |= {len(unit.layers) > 1 for unit in plan.units}
        covered = [name for unit in plan.units for name in unit.layers]
        assert len(covered) == len(set(covered)) == 14
    assert kinds == {True, False}
    two_sided = pipeline.plan(tiny_model(), "two-sided", BudgetConfig(param_fraction=0.5), statistics=statistics)
    assert all(len(unit.layers) == 1 for unit in two_sided.units)
    shared = MethodConfig(layouts=("dense", "shared"))
    plan = pipeline.plan(tiny_model(), shared, BudgetConfig(param_fraction=0.6), statistics=statistics)
    assert {unit.layout for unit in plan.units} <= {"dense", "shared", "factors"}
    assert all(len(unit.layers) > 1 or "proj+" not in unit.group for unit in plan.units)


def shares_kept(plan, statistics):
    """Of each unit, what it keeps of the parameters its layers had before anything was done to them."""
    layers = {layer.name: layer for group in statistics.groups.values() for layer in group.group.layers}
    before = {unit.unit: sum((layers[n].d_in + layers[n].bias) * layers[n].d_out for n in unit.layers) for unit in plan.units}
    return [unit.parameters / before[unit.unit] for unit in plan.units]


def test_a_floor_is_kept(statistics):
    plan = pipeline.plan(tiny_model(), "fasc", BudgetConfig(param_fraction=0.5, floor=0.35), statistics=statistics)
    assert min(shares_kept(plan, statistics)) >= 0.35
    free = pipeline.plan(tiny_model(), "fasc", BudgetConfig(param_fraction=0.5), statistics=statistics)
    assert min(shares_kept(free, statistics)) < 0.35


def test_the_dearer_a_product_the_fewer_are_made_and_the_budget_is_the_same(statistics):
    plans = [
        pipeline.plan(tiny_model(), "fasc", BudgetConfig(param_fraction=0.8, overhead=overhead), statistics=statistics)
        for overhead in (0, 200, 1_000, 10**9)
    ]
    factored = [sum(unit.layout != "dense" for unit in plan.units) for plan in plans]
    assert factored == sorted(factored, reverse=True)
    assert factored[0] > factored[2] > 0, "some are needed to keep the budget"
    losses = [plan.predicted_loss for plan in plans]
    assert losses == pytest.approx(sorted(losses))
    assert losses[0] < losses[2]
    assert all(plan.parameters <= 0.8 * plan.dense_parameters for plan in plans)


@pytest.mark.parametrize("kind", ["max_bytes", "max_kl", "model_fraction"])
def test_an_overhead_counts_under_every_budget_but_a_rank(statistics, kind):
    reached = pipeline.plan(tiny_model(), "fasc", BudgetConfig(param_fraction=0.8), statistics=statistics)
    asked = {"max_bytes": reached.totals["bytes"] + reached.model.header_bytes, "max_kl": reached.predicted_loss}
    budget = {kind: asked.get(kind, reached.totals["model_fraction"])}
    plain, counted = (
        pipeline.plan(tiny_model(), "fasc", BudgetConfig(**budget, overhead=overhead), statistics=statistics)
        for overhead in (0, 10**7)
    )
    assert sum(one.layout != "dense" for one in counted.units) < sum(one.layout != "dense" for one in plain.units)
    if kind == "max_kl":
        assert counted.predicted_loss <= reached.predicted_loss
    ranks = [
        pipeline.plan(tiny_model(), "fasc", BudgetConfig(rank_fraction=0.5, overhead=overhead), statistics=statistics).units
        for overhead in (0, 10**7)
    ]
    assert ranks[0] == ranks[1]


def test_ranks_are_multiples_where_layers_are_wide_enough():
    unit = UnitPlan("u", "g", ("u",), 256, (512,), 256, "dense", 0)
    ranks = candidates(unit, Rules(frozenset({"pivoted", "dense"}), rank_multiple=8)).ranks
    assert all(rank % 8 == 0 for rank in ranks)
    narrow = UnitPlan("u", "g", ("u",), 64, (64,), 64, "dense", 0)
    assert 3 in candidates(narrow, Rules(frozenset({"pivoted"}), rank_multiple=8)).ranks


def test_a_uniform_plan_spends_what_rounding_left():
    units = [candidates(UnitPlan("u", "g", ("u",), 256, (256,), 256, "dense", 0), Rules(frozenset({"factors", "dense"}), 8))] * 20
    picks = allocate_uniformly(units, 0.6)
    spent = sum(unit.costs[pick] for unit, pick in zip(units, picks, strict=False)) / sum(unit.whole for unit in units)
    assert 0.597 < spent <= 0.6
    assert max(picks) - min(picks) <= 1


def test_impossible_budgets_say_what_is_possible(statistics):
    with pytest.raises(BudgetError, match="smallest possible plan"):
        pipeline.plan(tiny_model(), "fasc", BudgetConfig(param_fraction=0.001), statistics=statistics)
    with pytest.raises(BudgetError, match="never compressed"):
        pipeline.plan(tiny_model(), "fasc", BudgetConfig(max_bytes="10kB"), statistics=statistics)


def test_plans_survive_json(statistics):
    plan = pipeline.plan(tiny_model(), "fasc", BudgetConfig(param_fraction=0.7), statistics=statistics)
    raw = json.loads(json.dumps(plan.to_dict()))
    assert RankPlan.from_dict(raw) == plan
    assert {"rank_fraction", "param_fraction", "model_fraction", "bytes", "predicted_loss"} <= set(raw["totals"])
    assert raw["forecast_memory"]["moments"] > 0
    assert plan.dense_nll > 0


def test_the_memory_forecast_is_what_the_tensors_weigh(tokens):
    model, budget = tiny_model(), BudgetConfig(param_fraction=0.6)
    statistics = collect(model, tokens, needs_for(MethodConfig(name="fasc"), budget))
    plan = pipeline.plan(model, "fasc", budget, statistics=statistics)
    forecast = plan.forecast_memory
    assert plan.cuts
    assert forecast["model"] == sum(p.numel() * 4 for p in model.parameters())
    matrices = [group.input.matrix for group in statistics.groups.values()]
    matrices += [gradient.covariance.matrix for group in statistics.groups.values() for gradient in group.gradients.values()]
    assert forecast["moments"] == 4 * sum(matrix.numel() for matrix in matrices)
    assert forecast["totals"] == 2 * forecast["moments"], "in float64, beside the others"
    dense = list(model.parameters())
    compress(model, statistics, plan)
    new = [p for p in [*model.parameters(), *model.buffers()] if all(p is not old for old in dense) and p.dim()]
    assert forecast["compressed"] == pytest.approx(sum(p.numel() * p.element_size() for p in new), rel=0.05)


def test_a_carried_out_plan_loses_what_it_forecast(statistics):
    model = tiny_model()
    plan = pipeline.plan(model, "fasc", BudgetConfig(param_fraction=0.7), statistics=statistics)
    done = compress(model, statistics, plan)
    assert done.predicted_loss == pytest.approx(plan.predicted_loss, rel=1e-9)


def test_units_of_a_group_are_named_like_their_layers(model):
    from fasc.model.options import LayersConfig
    from fasc.model.groups import find_groups

    group = find_groups(model, LayersConfig())[0]
    assert unit_of(group, group.layers).unit == group.name
    assert unit_of(group, group.layers[:1]).unit == group.layers[0].name
    assert stored_parameters("dense", 0, 4, 6, dense_biases=6) == 30


def test_every_methods_loss_can_be_forecast(statistics):
    """½J of a method that minimises something else, against the definition."""
    from fasc.statistics.moments import as_float64
    from fasc.forecast.half_j import fisher_loss_curve, half_energies, loss_curve
    from fasc.methods import decompose_unit, stacked_weight

    model = tiny_model()
    for group in list(statistics.groups.values())[:4]:
        unit = unit_of(group.group, group.group.layers)
        weight = stacked_weight(model, statistics, unit)
        found = statistics.groups[unit.group].unit(unit.unit)
        _, xx = as_float64(found.input)
        _, gg = as_float64(found.gradient.covariance)
        full = decompose_unit(model, statistics, unit, MethodConfig(name="svd"))
        curve = loss_curve(model, statistics, unit, "svd", full)
        for rank in (0, 5, 20):
            error = full.up[:, rank:] @ full.down[rank:]
            if found.gradient.side == "input":
                error = torch.linalg.pinv(weight) @ error
            by_definition = 0.5 * torch.trace(error.mT @ gg @ error @ xx)
            torch.testing.assert_close(curve[rank], by_definition, rtol=1e-6, atol=1e-12)
        ours = decompose_unit(model, statistics, unit, MethodConfig(name="fasc", damping=1e-9))
        torch.testing.assert_close(fisher_loss_curve(ours, weight, found), half_energies(ours), rtol=1e-4, atol=1e-9)
        assert (half_energies(ours) <= curve[: len(half_energies(ours))] * (1 + 1e-4) + 1e-12).all(), (
            "no method beats fasc on its own loss"
        )


def test_a_weight_without_full_rank_is_forecast_all_the_same():
    from fasc.forecast.half_j import _at_input

    generator = torch.Generator().manual_seed(0)
    full = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    poor = full @ torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=torch.float64))
    for weight in (full, poor):
        inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        found = _at_input(weight, weight @ inputs)
        torch.testing.assert_close(weight @ found, weight @ inputs)
        torch.testing.assert_close(found, torch.linalg.pinv(weight) @ weight @ inputs)


def test_budgets_that_differ_in_anything_have_names_that_tell_the_rows_of_a_run_apart():
    asked = [
        {},
        {"floor": 0.25},
        {"overhead": 4096},
        {"rank_multiple": 1},
        {"floor": 0.25, "rank_multiple": 16},
        {"channel_multiple": 256},
    ]
    labels = [BudgetConfig(param_fraction=0.8, **more).label for more in asked]
    assert labels == [
        "params0.8",
        "params0.8-floor0.25",
        "params0.8-overhead4096",
        "params0.8-multiple1",
        "params0.8-floor0.25-multiple16",
        "params0.8-channels256",
    ]
