"""``fasc plan``."""

from fasc.cli import options as opt
from fasc.model.options import LayersConfig, ModelConfig
from fasc.planning.options import BudgetConfig


def plan(
    model: opt.Model,
    method: opt.MethodName = None,
    rank_fraction: opt.RankFraction = None,
    param_fraction: opt.ParamFraction = None,
    model_fraction: opt.ModelFraction = None,
    max_bytes: opt.MaxBytes = None,
    max_perplexity_increase: opt.MaxPerplexityIncrease = None,
    max_kl: opt.MaxKl = None,
    allocation: opt.Allocation = None,
    layouts: opt.Layouts = None,
    engine: opt.Engine = None,
    rank_multiple: opt.RankMultiple = None,
    channel_multiple: opt.ChannelMultiple = None,
    floor: opt.Floor = None,
    overhead: opt.Overhead = None,
    statistics: opt.StatisticsFile = None,
    held_out: opt.HeldOutFile = None,
    damping: opt.Damping = None,
    method_option: opt.MethodOption = None,
    selection: opt.Selection = None,
    selection_threshold: opt.SelectionThreshold = None,
    selection_else: opt.SelectionElse = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    json: opt.Json = None,
    dtype: opt.DTypeName = None,
) -> None:
    """Print what a compressed model will weigh, and with --statistics what it is predicted to lose, before it is made.

    Without statistics the plan is uniform. Budgets: one of --rank-fraction, --param-fraction, --model-fraction, --max-bytes,
    --max-perplexity-increase, --max-kl.
    """
    given = locals()
    budget = opt.take(BudgetConfig, given)
    if statistics is None and allocation is None and not budget.limits_loss and engine in (None, "transformers"):
        given["allocation"] = "uniform"
    options = opt.method_for(given)
    source = opt.take(ModelConfig, given, device="cpu")
    layers = opt.take(LayersConfig, given)
    from fasc.planning.needs import needs_for
    from fasc.planning.table import edits_table, totals_table
    from fasc.reporting.console import print_results
    from fasc.stages.compress import load
    from fasc.stages.plan import plan_from_files

    needs_for(options, budget)
    opt.check_files(json, inputs=(model, statistics, held_out))
    result = plan_from_files(load(source), options, budget, layers, statistics, held_out)
    if json is not None:
        result.save(json)
    print_results(edits_table(result), totals_table(result))
