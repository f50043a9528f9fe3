"""``fasc subspace-overlap``."""

from typing import Annotated

import typer

from fasc.cli import options as opt
from fasc.model.options import LayersConfig, ModelConfig
from fasc.statistics.options import CalibrationConfig


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
    chat_template: opt.ChatTemplate = None,
    data_dir: opt.DataDir = None,
    batch_tokens: opt.BatchTokens = None,
    damping: opt.Damping = None,
    method_option: opt.MethodOption = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    dtype: opt.DTypeName = None,
    device: opt.Device = None,
) -> None:
    """Compare the subspaces a method chooses on several corpora and seeds, by principal angles, beside what chance gives."""
    given = locals()
    options = opt.method(given)
    fractions = [budget.rank_fraction or 0.5 for budget in opt.fractions(rank_fractions, "rank_fraction")]
    layers = opt.take(LayersConfig, given)
    calibrations = {
        f"{corpus} #{seed}": opt.take(CalibrationConfig, given, corpus=corpus, seed=seed)
        for corpus in opt.names(corpora) or ()
        for seed in opt.names(seeds) or ()
    }
    from fasc.outputs import write_artifact
    from fasc.provenance import provenance
    from fasc.reporting.overlap_table import print_curvature, print_overlaps
    from fasc.stages.compress import load, needs_of
    from fasc.stages.diagnose import check_overlap
    from fasc.stages.diagnose import subspace_overlap as compare

    needs_of((options,))
    check_overlap(calibrations, fractions, hessian)
    opt.check_files(json, inputs=(model, corpora), kind="overlap")
    loaded = load(opt.take(ModelConfig, given))
    result = compare(
        loaded,
        calibrations,
        options,
        fractions,
        layers,
        hessian=hessian,
        hessian_groups=hessian_groups,
        hessian_sequences=hessian_sequences,
    )
    if json is not None:
        made = provenance(calibrations=result.pop("calibrations"))
        write_artifact(json, "overlap", result | {"provenance": made})
    print_overlaps(result["summary"], options.name)
    if result["hessian"]:
        print_curvature(result["hessian"])
