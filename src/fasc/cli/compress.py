"""``fasc compress``."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fasc.cli import options as opt
from fasc.errors import UsageError
from fasc.model.options import LayersConfig, ModelConfig
from fasc.options import size
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.recipe import Recipe
from fasc.statistics.options import CalibrationConfig

if TYPE_CHECKING:
    from fasc.planning.plan import Plan


_PLANNED = (
    *BudgetConfig.model_fields,
    *MethodConfig.model_fields,
    *LayersConfig.model_fields,
    "damping",
    "method_option",
    "held_out",
)
"""Arguments that make a plan; one that is made already holds them."""


def compress(
    model: opt.Model,
    out: opt.Out,
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
    propagate: opt.Propagate = None,
    damping: opt.Damping = None,
    method_option: opt.MethodOption = None,
    selection: opt.Selection = None,
    selection_threshold: opt.SelectionThreshold = None,
    selection_share: opt.SelectionShare = None,
    selection_else: opt.SelectionElse = None,
    corpus: opt.Corpus = None,
    sequences: opt.Sequences = None,
    sequence_length: opt.SequenceLength = None,
    seed: opt.Seed = None,
    labels: opt.LabelsName = None,
    chat_template: opt.ChatTemplate = None,
    data_dir: opt.DataDir = None,
    statistics: opt.StatisticsFile = None,
    held_out: opt.HeldOutFile = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="Carry out this plan (from `fasc plan --json`).", show_default=False)
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Write an ordinary dense checkpoint, which loads without fasc.")] = False,
    format: Annotated[
        Literal["fasc", "compressed-tensors"] | None,
        typer.Option(
            "--format",
            help="`fasc`, or `compressed-tensors` for rounded layers that load without fasc. [default: fasc]",
            show_default=False,
        ),
    ] = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    batch_tokens: opt.BatchTokens = None,
    expert_floor: opt.ExpertFloor = None,
    route_all: opt.RouteAll = None,
    gradient_checkpointing: opt.Checkpointing = None,
    mixed_precision: opt.MixedCalibration = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
    device_map: opt.DeviceMapName = None,
    nproc: opt.Nproc = None,
    report: opt.Report = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max-shard-size", help="Of a file of weights at most, such as `5GB`. [default: transformers']", show_default=False
        ),
    ] = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Compress a model and write a Hugging Face checkpoint to --out.

    Budgets: one of --rank-fraction, --param-fraction, --model-fraction, --max-bytes, --max-perplexity-increase, --max-kl,
    --flop-fraction. What an interrupted run has measured is kept beside --out, and the same command goes on from there.
    """
    given = locals()
    recipe = Recipe(
        source=opt.take(ModelConfig, given),
        calibration=opt.take(CalibrationConfig, given),
        layers=opt.take(LayersConfig, given),
        methods=(opt.method_for(given),),
        budgets=(opt.budget_for(given),),
    )
    from fasc.cli.processes import first, launched, output_of_the_first
    from fasc.planning.needs import needs_for
    from fasc.planning.plan import Plan
    from fasc.reporting.console import print_line
    from fasc.reporting.outcome import print_outcome
    from fasc.serving.checkpoint import require_own_checkpoint
    from fasc.serving.presets import is_merged
    from fasc.stages.compress import compress_recipe

    opt.unused(given, tuple(CalibrationConfig.model_fields), "beside --statistics", when=statistics is not None)
    merge = merge or is_merged(engine)
    shard = None if max_shard_size is None else size("--max-shard-size", max_shard_size)
    needs_for(recipe.methods[0], recipe.budgets[0])
    made = None if plan is None else Plan.load(plan)
    if made is not None:
        _require_no_other(made, given)
    if launched(nproc, recipe.source.device, None if statistics is not None else recipe.calibration.sequences):
        return
    sources = (model, statistics, held_out, plan, recipe.calibration.corpus)
    if first():
        opt.check_report(report, inputs=sources, out=out)
    with output_of_the_first(out, overwrite=overwrite, inputs=sources, folder=True, owned=require_own_checkpoint) as target:
        small = compress_recipe(
            recipe,
            target,
            statistics=statistics,
            held_out=held_out,
            plan=made,
            merged=merge,
            overwrite=overwrite,
            format="fasc" if format is None else format,
            max_shard_size=shard,
        )
    print_outcome(small.plan, out, recipe.source.model, merged=merge, model_type=small.model.config.model_type)
    if report is not None and first():
        from fasc.reporting.page.sources import read_source

        opt.write_report(report, read_source(out))
    print_line(out)


def _require_no_other(plan: "Plan", given: Mapping[str, Any]) -> None:
    """A plan is carried out as it is: refuse options that would change it."""
    if given["method"] not in (None, plan.method):
        raise UsageError(
            f"`{given['plan']}` is a plan for `{plan.method}`, not `{given['method']}`",
            "leave --method out: a plan holds its own",
        )
    other = next((name for name in _PLANNED if given.get(name) is not None), None)
    if other is not None:
        raise UsageError(
            f"--{other.replace('_', '-')} and --plan were both given", "a plan holds its own: make another with `fasc plan`"
        )
