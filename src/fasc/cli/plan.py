"""``fasc plan``."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fasc.cli import options as opt
from fasc.errors import UsageError
from fasc.model.options import LayersConfig, ModelConfig
from fasc.options import size
from fasc.planning.options import BudgetConfig, MethodConfig


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
    selection_share: opt.SelectionShare = None,
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
    config_only: Annotated[
        bool,
        typer.Option(
            "--config-only",
            help="Load no weights: MODEL is a hub id, a folder or a config.json. Prints what is left in a uniform plan, and "
            "what a run needs in memory.",
        ),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory", help="With --config-only: of the machine, such as `24GB`. [default: this one's]", show_default=False
        ),
    ] = None,
    json: opt.Json = None,
    dtype: opt.DTypeName = None,
    nproc: opt.Nproc = None,
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
    from fasc.cli.processes import first, launched
    from fasc.planning.needs import needs_for
    from fasc.planning.table import tables
    from fasc.reporting.console import print_results
    from fasc.stages.compress import load
    from fasc.stages.plan import plan_from_files

    opt.unused(given, ("nproc",), "beside --config-only and --frontier", when=config_only or frontier is not None)
    if config_only:
        _print_needs(source, options, budget, layers, memory, json, given)
        return
    if memory is not None:
        raise UsageError("--memory is for --config-only: a plan of a loaded model prints what its run needs", "leave it out")
    if frontier is not None:
        _print_frontier(source, options, layers, statistics, frontier, json)
        return
    needs_for(options, budget)
    if launched(nproc, "cpu"):
        return
    if first():
        opt.check_files(json, inputs=(model, statistics, held_out, validation), kind="plan")
    result = plan_from_files(load(source), options, budget, layers, statistics, held_out, validation)
    if json is not None and first():
        result.save(json)
    print_results(*tables(result))
    _say_what_lacks(statistics)


def _say_what_lacks(statistics: Path | None) -> None:
    from fasc.progress import say

    if statistics is None:
        say("sizes only; with --statistics (from `fasc collect`) it also says what the model is predicted to lose")


def _print_needs(
    source: ModelConfig,
    options: MethodConfig,
    budget: BudgetConfig,
    layers: LayersConfig,
    memory: str | None,
    json: Path | None,
    given: Mapping[str, Any],
) -> None:
    import psutil

    from fasc.outputs import write_artifact
    from fasc.planning.table import totals_table
    from fasc.reporting.console import print_results
    from fasc.reporting.requirements import passes_line, requirements_table
    from fasc.stages.plan import plan_of_config

    measured = [name for name in ("statistics", "held_out", "validation", "frontier") if given[name] is not None]
    if measured:
        option = f"--{measured[0].replace('_', '-')}"
        raise UsageError(f"--config-only loads no model, and {option} belongs to one", "leave one of them out")
    opt.check_files(json, inputs=(source.model,), kind="requirements")
    limit = psutil.virtual_memory().total if memory is None else size("--memory", memory)
    made, needed = plan_of_config(source.model, options, budget, layers, dtype=source.dtype, limit=limit)
    if json is not None:
        write_artifact(json, "requirements", {"model": source.model, "totals": made.totals, **needed.to_dict()})
    plain = replace(made, forecast_memory=None)  # memory has a table of its own
    print_results(totals_table(plain), requirements_table(needed), passes_line(needed))


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
    opt.check_files(json, figure, inputs=(source.model, statistics), kind="frontier")
    chosen = options if options.bits else options.but(bits=MENU)
    points = frontier_from_files(load(source), chosen, layers, statistics)
    print_results(frontier_table(points), verdict(points))
    frontier_figure(points, figure)
    if json is not None:
        write_artifact(json, "frontier", {"points": [point.to_dict() for point in points]})
