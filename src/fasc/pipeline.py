"""The stages in order; what is already on disk is not done again."""

from collections.abc import Callable, Sequence
from pathlib import Path

import tomli_w
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.budget.plan import RankPlan
from fasc.budget.uniform import allocate_uniformly
from fasc.calibration.collect import collect
from fasc.calibration.corpus import TextRequest, TokenBlock, load_corpus
from fasc.calibration.statistics import Need, Statistics
from fasc.compression.compress import compress
from fasc.compression.merge import merge
from fasc.config import (
    BudgetConfig,
    CalibrationConfig,
    EvaluationConfig,
    LayersConfig,
    MethodConfig,
    ModelConfig,
    Recipe,
)
from fasc.diagnosis.diagnose import diagnose
from fasc.errors import StorageError
from fasc.evaluation import get_benchmark
from fasc.evaluation.evaluate import evaluate
from fasc.evaluation.score import Score
from fasc.evaluation.text import evaluation_text
from fasc.methods import get_method
from fasc.model.checkpoint import CheckpointNotes, read_provenance, save_checkpoint
from fasc.model.groups import InputGroup, find_groups
from fasc.model.load import LoadedModel, load_model, model_fingerprint
from fasc.progress import say
from fasc.provenance import provenance
from fasc.reporting.card import model_card
from fasc.reporting.entries import DENSE
from fasc.reporting.report import report
from fasc.storage import new_file, write_json


def load(source: ModelConfig) -> LoadedModel:
    """Load the model of a recipe."""
    return load_model(source.model, dtype=source.dtype, device=source.device)


def needs_of(methods: Sequence[MethodConfig]) -> frozenset[Need]:
    """Union of what the methods must be given.

    Raises:
        UnknownNameError: a method does not exist.
    """
    return frozenset().union(*(get_method(options.name).needs for options in methods))


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    needs: frozenset[Need],
    calibration: CalibrationConfig,
    layers: LayersConfig,
) -> Statistics:
    """Load the calibration text and measure the moments."""
    block = load_corpus(
        model,
        tokenizer,
        TextRequest(
            corpus=calibration.corpus,
            sequences=calibration.sequences,
            sequence_length=calibration.sequence_length,
            seed=calibration.seed,
            role="calibration",
            data_dir=calibration.data_dir,
        ),
    )
    statistics = collect(model, block.tokens, needs, calibration=calibration, layers=layers)
    return Statistics(statistics.groups, {**statistics.meta, "text_digest": block.text_digest})


def plan(
    model: PreTrainedModel,
    method: str,
    budget: BudgetConfig,
    *,
    layers: LayersConfig | None = None,
    groups: Sequence[InputGroup] | None = None,
) -> RankPlan:
    """A rank for every unit of the model, before any calibration.

    Args:
        model: the dense model.
        method: a registered method; it says which layers share a projector.
        budget: how much is kept.
        layers: which layers; ignored if ``groups`` are given.
        groups: the input groups, if they are known already.

    Raises:
        UnknownNameError: no such method.
        BudgetError: the budget cannot be kept.
    """
    groups = find_groups(model, layers or LayersConfig()) if groups is None else groups
    return allocate_uniformly(
        groups,
        budget.rank_fraction,
        method=method,
        scope=get_method(method).scope,
        model_parameters=model.num_parameters(),
        bytes_per_parameter=model.dtype.itemsize,
    )


def compress_and_save(
    loaded: LoadedModel,
    statistics: Statistics,
    recipe: Recipe,
    out: Path,
    *,
    rank_plan: RankPlan | None = None,
    merged: bool = False,
    overwrite: bool = False,
) -> RankPlan:
    """Compress the loaded model in place with the recipe's first method and budget, and write the checkpoint.

    Returns:
        The plan as carried out, with predicted losses where the method's energies are a loss.
    """
    options = recipe.methods[0]
    groups = [group.group for group in statistics.groups.values()]
    rank_plan = rank_plan or plan(loaded.model, options.name, recipe.budgets[0], groups=groups)
    done = compress(loaded.model, statistics, rank_plan, options)
    folded = merge(loaded.model, statistics, options.damping) if merged else []
    kept = {key: value for key, value in statistics.meta.items() if key != "provenance"}
    made = provenance(model=recipe.source.model, statistics=kept, merged=merged, folded_biases=folded)
    card = model_card(recipe, done, get_method(options.name).summary, made, merged=merged)
    notes = CheckpointNotes(recipe=recipe.to_dict(), provenance=made, plan=done.to_dict(), card=card)
    save_checkpoint(loaded.model, loaded.tokenizer, out, notes, overwrite=overwrite)
    return done


def entry_name(options: MethodConfig, budget: BudgetConfig, *, only_budget: bool) -> str:
    """Folder and row name of a method at a budget in a run."""
    name = f"{options.name}-oblique" if options.reading == "oblique" else options.name
    return name if only_budget else f"{name}@{budget.rank_fraction:g}"


def run(recipe: Recipe, out: Path, *, overwrite: bool = False) -> Path:
    """Calibrate once, then diagnose, and plan, compress and evaluate with every method; evaluate the dense model; report.

    A run that was interrupted goes on: what is whole on disk is not done again.

    Args:
        recipe: everything the run is told.
        out: its folder; one that holds another recipe is refused.
        overwrite: start over even if the folder holds a run.

    Returns:
        The path of the report.

    Raises:
        StorageError: the folder holds something else.
        FascError: any stage's own.
    """
    needs = needs_of(recipe.methods)
    _open_folder(recipe, out, overwrite=overwrite)
    loaded = load(recipe.source)
    statistics = _statistics(loaded, recipe, needs, out)
    if not (out / "diagnosis.json").is_file():
        fraction = recipe.budgets[0].rank_fraction
        losses = [options for options in recipe.methods if get_method(options.name).energy_unit == "nats²/token"]
        shown = losses[:1] or recipe.methods[:1]  # the report draws one forecast; `fasc diagnose` shows any
        diagnose(loaded.model, statistics, shown, rank_fraction=fraction).save(out / "diagnosis.json")
    facts = {key: value for key, value in statistics.meta.items() if key != "provenance"}
    write_json(out / "provenance.json", provenance(model=recipe.source.model, statistics=facts))
    config = recipe.evaluation
    dense_config = config.model_copy(
        update={"benchmarks": tuple(name for name in config.benchmarks if not get_benchmark(name).needs_dense)}
    )
    texts = _Texts(loaded, config)
    _score(out / DENSE, lambda: loaded, dense_config, None, texts)
    for budget in recipe.budgets:
        for options in recipe.methods:
            one = recipe.model_copy(update={"methods": (options,), "budgets": (budget,)})
            name = entry_name(options, budget, only_budget=len(recipe.budgets) == 1)
            _run_method(one, statistics, out / name, loaded, texts)
    return report(out)


def _open_folder(recipe: Recipe, out: Path, *, overwrite: bool) -> None:
    text = tomli_w.dumps(recipe.to_dict())
    file = out / "recipe.toml"
    if file.is_file() and not overwrite:
        if file.read_text(encoding="utf-8") != text:
            raise StorageError(f"`{out}` holds a run of another recipe", "choose another --out, or pass --overwrite")
        say(f"{out} holds this run already: going on where it stopped")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (overwrite and file.is_file()):
            raise StorageError(f"`{out}` already exists and holds no run", "choose another --out")
        for stale in [*out.glob("*/scores.json"), *out.glob("*/plan.json"), *out.glob("*.json"), out / "statistics.safetensors"]:
            stale.unlink(missing_ok=True)
    with new_file(file) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _statistics(loaded: LoadedModel, recipe: Recipe, needs: frozenset[Need], out: Path) -> Statistics:
    file = out / "statistics.safetensors"
    if file.is_file():
        statistics = Statistics.load(file)
        statistics.require(needs)
        statistics.require_model(model_fingerprint(loaded.model))
        return statistics
    statistics = calibrate(loaded.model, loaded.tokenizer, needs, recipe.calibration, recipe.layers)
    statistics.save(file)
    return statistics


class _Texts:
    """The held-out text of a run: loaded (or sampled) once, when it is first needed."""

    def __init__(self, dense: LoadedModel, config: EvaluationConfig) -> None:
        self._dense, self._config = dense, config
        self._block: TokenBlock | None = None

    def get(self) -> TokenBlock | None:
        """The windows, or ``None`` if no benchmark needs text."""
        if self._block is None and any(get_benchmark(name).needs_text for name in self._config.benchmarks):
            self._block = evaluation_text(*self._dense, self._config)
        return self._block


def _run_method(recipe: Recipe, statistics: Statistics, folder: Path, dense: LoadedModel, texts: _Texts) -> None:
    checkpoint = folder / "model"
    if not (folder / "plan.json").is_file():
        done = compress_and_save(load(recipe.source), statistics, recipe, checkpoint, overwrite=True)
        write_json(folder / "plan.json", done.to_dict())
    source = recipe.source.model_copy(update={"model": str(checkpoint)})
    _score(folder, lambda: load(source), recipe.evaluation, dense.model, texts)


def _score(
    folder: Path,
    get_model: Callable[[], LoadedModel],
    config: EvaluationConfig,
    dense: PreTrainedModel | None,
    texts: _Texts,
) -> None:
    if (folder / "scores.json").is_file():
        return
    loaded = get_model()
    say(f"evaluating {folder.name}")
    digest = calibration_digest(folder / "model")
    scores = evaluate(loaded.model, loaded.tokenizer, config, dense=dense, text=texts.get(), calibrated_on=digest)
    write_scores(folder / "scores.json", scores, config)


def write_scores(path: Path, scores: Sequence[Score], config: EvaluationConfig) -> None:
    """Write scores with how they were made."""
    made = provenance(evaluation=config.model_dump(mode="json", exclude_none=True))
    write_json(path, {"scores": [score.to_dict() for score in scores], "provenance": made})


def dense_of(checkpoint: str) -> str | None:
    """The model a checkpoint was compressed from, if it says so."""
    found = read_provenance(checkpoint)
    return None if found is None else found.get("model")


def calibration_digest(checkpoint: str | Path) -> str | None:
    """Digest of the text a checkpoint was calibrated on, if it says so."""
    found = read_provenance(checkpoint)
    return None if found is None else found.get("statistics", {}).get("text_digest")
