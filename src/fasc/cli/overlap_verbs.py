"""``fasc subspace-overlap``."""

from typing import TYPE_CHECKING, Annotated

import typer

from fasc.cli import options as opt
from fasc.model.options import LayersConfig, ModelConfig
from fasc.planning.options import MethodConfig
from fasc.statistics.options import CalibrationConfig
from fasc.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fasc.statistics.moments import Statistics
    from fasc.model.load import LoadedModel


def subspace_overlap(
    model: opt.Model,
    corpora: Annotated[
        str, typer.Option("--corpora", help="Corpora to compare, separated by commas; each as for --corpus.")
    ] = "self",
    seeds: Annotated[
        str,
        typer.Option("--seeds", help="Seeds, separated by commas; every corpus is measured with each. Two say what noise does."),
    ] = "0,1",
    method: opt.MethodName = None,
    rank_fractions: Annotated[
        str, typer.Option("--rank-fractions", help="Rank fractions, separated by commas.")
    ] = "0.125,0.25,0.5",
    hessian: Annotated[
        int, typer.Option("--hessian", min=0, help="Also compare with so many leading eigenvectors of the Hessian (slow).")
    ] = 0,
    hessian_groups: Annotated[
        int,
        typer.Option("--hessian-groups", min=1, help="Of so many groups, evenly spread over those with the least to the most ρ."),
    ] = 6,
    hessian_sequences: Annotated[
        int,
        typer.Option("--hessian-sequences", min=1, help="On so many sequences of the first corpus, disjoint from the moments'."),
    ] = 4,
    json: opt.Json = None,
    sequences: opt.Sequences = None,
    sequence_length: opt.SequenceLength = None,
    labels: opt.LabelsName = None,
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = None,
    damping: opt.Damping = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
) -> None:
    """Compare the subspaces a method chooses on several corpora and seeds, by principal angles, beside what chance gives."""
    given = locals()
    options = opt.build(MethodConfig, name=method, damping=damping)
    fractions = [budget.rank_fraction or 0.5 for budget in opt.fractions(rank_fractions, "rank_fraction")]
    layers = opt.take(LayersConfig, given)
    calibrations = {
        f"{corpus} #{seed}": opt.take(CalibrationConfig, given, corpus=corpus, seed=seed)
        for corpus in opt.names(corpora) or ()
        for seed in opt.names(seeds) or ()
    }
    if not calibrations or not fractions or (len(calibrations) < 2 and not hessian):
        raise UsageError(f"{len(calibrations)} calibration leaves nothing to compare", "give several --corpora or --seeds")
    from fasc import pipeline
    from fasc.diagnosis.curvature import compare_with_hessian
    from fasc.diagnosis.diagnose import DEPENDENCE_NEEDS
    from fasc.diagnosis.overlap import compare_subspaces, reading_bases, summarise_overlaps
    from fasc.methods import get_method
    from fasc.progress import say
    from fasc.provenance import provenance
    from fasc.reporting.overlap_table import print_curvature, print_overlaps
    from fasc.storage import write_json

    chosen = get_method(options.name)
    needs = chosen.needs_in(("group",)) | (DEPENDENCE_NEEDS if hessian else frozenset())
    loaded = pipeline.load(opt.take(ModelConfig, given))
    first: Statistics | None = None
    bases, digests = {}, {}
    for label, calibration in calibrations.items():  # one calibration's moments in memory at a time, beside the first's
        say(f"measuring {label}")
        found = pipeline.calibrate(loaded.model, loaded.tokenizer, needs, calibration, layers)
        bases[label] = reading_bases(loaded.model, found, options, max(fractions))
        digests[label] = {"token_digest": found.meta["token_digest"], "calibration": found.meta["calibration"]}
        first = first or found
    assert first is not None  # noqa: S101 - there is at least one calibration
    rows = compare_subspaces(first, bases, fractions)
    summary = summarise_overlaps(rows)
    print_overlaps(summary, options.name)
    curvature = []
    if hessian:
        tokens = pipeline.held_out(loaded, next(iter(calibrations.values())), hessian_sequences)
        groups = _spread(first, loaded, hessian_groups)
        curvature = compare_with_hessian(loaded.model, first, tokens, groups, hessian, options)
        print_curvature(curvature)
    if json is not None:
        made = provenance(calibrations=digests)
        write_json(json, {"rows": rows, "summary": summary, "hessian": curvature, "provenance": made})


def _spread(statistics: "Statistics", loaded: "LoadedModel", count: int) -> list[str]:
    """So many groups, from the least to the most ρ."""
    from fasc.diagnosis.dependence import group_dependence

    found: Mapping[str, float] = {
        name: dependence.rho
        for name, group in statistics.groups.items()
        if (dependence := group_dependence(loaded.model, group)) is not None
    }
    ordered = sorted(found, key=lambda name: found[name])
    steps = max(1, count - 1)
    return list(dict.fromkeys(ordered[round(i * (len(ordered) - 1) / steps)] for i in range(count)))
