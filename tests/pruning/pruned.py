"""A pruned model, with what it was pruned by."""

from fasc.compression.compress import carry_out
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from fasc.statistics.options import CalibrationConfig


def statistics_of(model, tokens, name):
    """What a pruning method needs."""
    return collect_moments(
        model, tokens, needs_for(MethodConfig(name=name), None), calibration=CalibrationConfig(batch_tokens=160)
    )


def pruned(model, tokens, name, **budget):
    """Prune a model in place; gives the statistics, the plan, and the plan as it was carried out."""
    statistics = statistics_of(model, tokens, name)
    made = plan(model, statistics, method=name, rank_multiple=1, **budget)
    return statistics, made, carry_out(model, statistics, made)
