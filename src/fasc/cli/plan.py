"""``fasc plan``."""

from pathlib import Path
from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.model.options import LayersConfig, ModelConfig
from fasc.planning.options import MethodConfig


def plan(
    model: opt.Model,
    method: opt.MethodName = None,
    rank_fraction: opt.RankFraction = None,
    param_fraction: opt.ParamFraction = None,
    model_fraction: opt.ModelFraction = None,
    max_bytes: opt.MaxBytes = None,
    max_perplexity_increase: opt.MaxPerplexityIncrease = None,
    max_kl: opt.MaxKl = None,
    flop_fraction: opt.FlopFraction = None,
    allocation: opt.Allocation = None,
    layouts: opt.Layouts = None,
    bits: opt.Bits = None,
    bits_group: opt.BitsGroup = None,
    bits_vocabulary: opt.BitsVocabulary = None,
    engine: opt.Engine = None,
    rank_multiple: opt.RankMultiple = None,
    channel_multiple: opt.ChannelMultiple = None,
    equal_experts: opt.EqualExperts = None,
    floor: opt.Floor = None,
    overhead: opt.Overhead = None,
    statistics: opt.StatisticsFile = None,
    held_out: opt.HeldOutFile = None,
    validation: Annotated[
        Path | None,
        typer.Option(
            "--validation",
            help="File of `fasc validate --json` of this model: what plans were measured to lose corrects the forecast.",
            show_default=False,
        ),
    ] = None,
    damping: opt.Damping = None,
    method_option: opt.MethodOption = None,
    selection: opt.Selection = None,
    selection_threshold: opt.SelectionThreshold = None,
    selection_else: opt.SelectionElse = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    frontier: Annotated[
        Path | None,
        typer.Option(
            "--frontier",
            help="Instead of one plan: what fewer weights, fewer bits and both lose at many sizes, printed and in this PNG.",
            show_default=False,
        ),
    ] = None,
    json: opt.Json = None,
    dtype: opt.DTypeName = None,
) -> None:
    """Print what a compressed model will weigh, and with --statistics what it is predicted to lose, before it is made.

    Without statistics the plan is uniform. Budgets: one of --rank-fraction, --param-fraction, --model-fraction, --max-bytes,
    --max-perplexity-increase, --max-kl, --flop-fraction.
    """
    given = locals()
    budget = opt.budget_for(given)
    plain = not bits and engine in (None, "transformers")
    if statistics is None and allocation is None and not budget.limits_loss and plain:
        given["allocation"] = "uniform"
    options = opt.method_for(given)
    source = opt.take(ModelConfig, given, device="cpu")
    layers = opt.take(LayersConfig, given)
    from fasc.planning.needs import needs_for
    from fasc.planning.table import tables
    from fasc.reporting.console import print_results
    from fasc.stages.compress import load
    from fasc.stages.plan import plan_from_files

    if frontier is not None:
        _print_frontier(source, options, layers, statistics, frontier, json)
        return
    needs_for(options, budget)
    opt.check_files(json, inputs=(model, statistics, held_out, validation))
    result = plan_from_files(load(source), options, budget, layers, statistics, held_out, validation)
    if json is not None:
        result.save(json)
    print_results(*tables(result))


def _print_frontier(
    source: ModelConfig, options: MethodConfig, layers: LayersConfig, statistics: Path | None, figure: Path, json: Path | None
) -> None:
    from fasc.errors import UsageError
    from fasc.outputs import write_artifact
    from fasc.planning.frontier import MENU, verdict
    from fasc.reporting.console import print_results
    from fasc.reporting.frontier import frontier_figure, frontier_table
    from fasc.stages.compress import load
    from fasc.stages.plan import frontier_from_files

    if statistics is None:
        raise UsageError("a frontier is made of forecasts: there are no statistics", "give --statistics (from `fasc collect`)")
    opt.check_files(figure, json, inputs=(source.model, statistics))
    chosen = options if options.bits else options.but(bits=MENU)
    points = frontier_from_files(load(source), chosen, layers, statistics)
    print_results(frontier_table(points), verdict(points))
    frontier_figure(points, figure)
    if json is not None:
        write_artifact(json, "frontier", {"points": [point.to_dict() for point in points]})
