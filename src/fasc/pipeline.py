"""The stages in order; what is already on disk is not done again."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from time import perf_counter
from typing import NamedTuple

import tomli_w
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.planning.plan import RankPlan, read_plan
from fasc.statistics.collect import collect
from fasc.text.corpus import TextRequest, TokenBlock, load_corpus
from fasc.statistics.moments import Need, Statistics
from fasc.compression.trial import UnitTester
from fasc.compression.compress import compress
from fasc.paper.selection import gate_plan
from fasc.forecast.cache import kept_forecasts
from fasc.compression.merge import merge
from fasc.planning.make import Curves, needs_for, plan_model
from fasc.compression.recover import Recovered, recover
from fasc.compression.options import RecoveryConfig
from fasc.evaluation.options import EvaluationConfig
from fasc.model.options import LayersConfig, ModelConfig
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.recipe import Recipe, read_recipe
from fasc.statistics.options import CalibrationConfig
from fasc.diagnosis.diagnose import diagnose
from fasc.errors import ModelError, StorageError, UsageError
from fasc.evaluation import get_benchmark
from fasc.evaluation.evaluate import evaluate
from fasc.evaluation.score import Score
from fasc.evaluation.text import evaluation_texts
from fasc.methods import METHODS, get_method
from fasc.model.checkpoint import PLAN_FILE, RECIPE_FILE, CheckpointNotes, read_provenance, save_checkpoint
from fasc.model.groups import find_groups
from fasc.model.load import LoadedModel, load_model, model_fingerprint
from fasc.progress import say
from fasc.provenance import file_digest, provenance, recoveries
from fasc.pruning import PRUNINGS, find_method
from fasc.reporting.card import model_card
from fasc.reporting.entries import DENSE
from fasc.reporting.report import report
from fasc.storage import new_file, read_json, work_folder, write_json


def load(source: ModelConfig) -> LoadedModel:
    """Load the model of a recipe."""
    return load_model(source.model, dtype=source.dtype, device=source.device)


def needs_of(methods: Sequence[MethodConfig], budgets: Sequence[BudgetConfig] | None = None) -> frozenset[Need]:
    """Union of what the methods must be given.

    Args:
        methods: the methods.
        budgets: what they will be asked for; without them, whatever any budget may need.

    Raises:
        UnknownNameError: a method does not exist.
        BudgetError: a method cannot serve a budget.
    """
    if budgets is None:
        return frozenset().union(*(needs_for(options, None) for options in methods))
    return frozenset().union(*(needs_for(options, budget) for options in methods for budget in budgets))


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    needs: frozenset[Need],
    calibration: CalibrationConfig,
    layers: LayersConfig,
) -> Statistics:
    """Load the calibration text and measure the moments."""
    if calibration.skip and calibration.corpus == "self":
        raise UsageError("text sampled from the model has no order to skip in", "draw other text with another --seed")
    block = load_corpus(
        model,
        tokenizer,
        TextRequest(
            corpus=calibration.corpus,
            sequences=calibration.skip + calibration.sequences,
            sequence_length=calibration.sequence_length,
            seed=calibration.seed,
            role="calibration",
            data_dir=calibration.data_dir,
        ),
    )
    statistics = collect(model, block.tokens[calibration.skip :], needs, calibration=calibration, layers=layers)
    return replace(statistics, meta={**statistics.meta, "text_digest": block.text_digest})


def held_out(loaded: LoadedModel, calibration: CalibrationConfig, sequences: int) -> Tensor:
    """More sequences of the calibration corpus, disjoint from those that calibrate.

    Args:
        loaded: model and tokenizer.
        calibration: of the run.
        sequences: how many.

    Returns:
        Tokens, [sequences, length].
    """
    extra = (
        0 if calibration.corpus == "self" else calibration.skip + calibration.sequences
    )  # drawn after those, in the same order
    request = TextRequest(
        corpus=calibration.corpus,
        sequences=extra + sequences,
        sequence_length=calibration.sequence_length,
        seed=calibration.seed + (calibration.corpus == "self"),
        role="calibration",
        data_dir=calibration.data_dir,
    )
    return load_corpus(loaded.model, loaded.tokenizer, request).tokens[extra:]


def plan(  # noqa: PLR0913 - each is a source or a switch of the plan
    model: PreTrainedModel,
    method: str | MethodConfig,
    budget: BudgetConfig,
    *,
    layers: LayersConfig | None = None,
    statistics: Statistics | None = None,
    known: dict[str, Curves] | None = None,
    forecast: bool = True,
    held_out: Statistics | None = None,
) -> RankPlan:
    """A rank and a layout for every unit of the model.

    Args:
        model: the dense model.
        method: a registered method, by name or with its options.
        budget: how much is kept, or how much may be lost.
        layers: which layers; those of the statistics if there are any.
        statistics: without them only a uniform plan of a fraction can be had, and no forecast.
        known: forecasts of earlier calls on the same statistics, which this one adds to.
        forecast: as for :func:`~fasc.planning.make.plan_model`.
        held_out: likewise.

    Raises:
        UnknownNameError: no such method.
        BudgetError: the budget cannot be kept.
    """
    options = MethodConfig(name=method) if isinstance(method, str) else method
    if statistics is not None and layers is None:
        groups = [group.group for group in statistics.present_in(model).groups.values()]
    else:
        groups = find_groups(model, layers or LayersConfig())
    return plan_model(model, groups, options, budget, statistics, known=known, forecast=forecast, held_out=held_out)


def compress_and_save(  # noqa: PLR0913 - each is a switch of one of its stages
    loaded: LoadedModel,
    statistics: Statistics,
    recipe: Recipe,
    out: Path,
    *,
    rank_plan: RankPlan | None = None,
    merged: bool = False,
    overwrite: bool = False,
    work: Path | None = None,
) -> RankPlan:
    """Compress the loaded model in place with the recipe's first method and budget, and write the checkpoint.

    Args:
        loaded: the dense model.
        statistics: measured on it.
        recipe: of the run.
        out: the checkpoint's folder.
        rank_plan: carried out instead of one made here.
        merged: write an ordinary dense checkpoint.
        overwrite: replace what is there.
        work: folder in which an interrupted compression with propagation goes on.

    Returns:
        The plan as carried out, with predicted losses where the method's energies are a loss.
    """
    recipe = _mergeable(recipe) if merged else recipe
    options = recipe.methods[0]
    rank_plan = rank_plan or gated_plan(loaded, statistics, recipe)
    done = compress(loaded.model, statistics, rank_plan, options, work=work)
    folded = merge(loaded.model, statistics, options.damping) if merged else []
    kept = {key: value for key, value in statistics.meta.items() if key != "provenance"}
    made = provenance(model=recipe.source.model, statistics=kept, merged=merged, folded_biases=folded)
    card = model_card(recipe, done, find_method(options.name).summary, made, merged=merged)
    notes = CheckpointNotes(recipe=recipe.to_dict(), provenance=made, plan=done.to_dict(), card=card)
    save_checkpoint(loaded.model, loaded.tokenizer, out, notes, overwrite=overwrite)
    return done


def _mergeable(recipe: Recipe) -> Recipe:
    """Without fewer channels per MLP: an ordinary checkpoint has one number of them for all blocks."""
    first, *others = recipe.methods
    layouts = tuple(layout for layout in first.layouts if layout != "channels")
    return recipe.model_copy(update={"methods": (first.model_copy(update={"layouts": layouts}), *others)})


def recover_and_save(
    source: ModelConfig, out: Path, config: RecoveryConfig, *, dense: str | LoadedModel | None = None, overwrite: bool = False
) -> Recovered:
    """Train the replaced layers of a checkpoint towards the dense model, and write a new checkpoint.

    Trains in float32 and writes the precision that the checkpoint has. One sequence in sixteen is held out (see ``recover``).
    A call that is killed leaves its text and the state of its training, at most a few minutes old, in a hidden folder beside
    ``out``; the same call goes on from there.

    Args:
        source: the compressed checkpoint, a folder of ours.
        out: the new checkpoint's folder.
        config: text, sizes and rates.
        dense: the dense model, loaded or not, if not the one that the checkpoint names.
        overwrite: replace what is there.

    Raises:
        ModelError: the folder is no checkpoint of ours.
        FascError: as :func:`~fasc.compression.recover.recover`.
    """
    folder = Path(source.model)
    made = read_provenance(folder)
    if made is None:
        raise ModelError(f"`{folder}` is no checkpoint of fasc", "name a folder that `fasc compress` wrote")
    recipe = read_recipe(folder / RECIPE_FILE)
    done = read_plan(folder / PLAN_FILE, recipe.methods[0].name)
    loaded = load(source.model_copy(update={"dtype": "float32"}))
    if not isinstance(dense, LoadedModel):
        dense = load(recipe.source.model_copy(update={"model": dense or made["model"], "device": source.device}))
    request = TextRequest(
        corpus=config.corpus or recipe.calibration.corpus,
        sequences=config.sequences,
        sequence_length=config.sequence_length,
        seed=config.seed,
        role="calibration",
        data_dir=config.data_dir or recipe.calibration.data_dir,
    )
    key = {"recovery": config.model_dump(mode="json"), "corpus": request.corpus}
    key["models"] = [model_fingerprint(one.model) for one in (loaded, dense)]
    with work_folder(out.with_name(f".{out.name}.work"), key) as work:
        block = _kept_text(dense, request, work)
        result = recover(loaded.model, dense.model, block.tokens, config, work)
        told = config.model_dump(mode="json", exclude_none=True) | {"corpus": block.corpus, "tokens": block.tokens.numel()}
        recovery = told | {"text_digest": block.text_digest, "token_digest": block.token_digest, "kl": _told(result)}
        if "recovery" in made:
            recovery["after"] = made["recovery"]
        facts = {key: made[key] for key in ("model", "statistics", "merged", "folded_biases") if key in made}
        loaded.model.to(getattr(torch, read_json(folder / "config.json").get("dtype", "float32")))
        now = provenance(**facts | {"recovery": recovery, "compressed": {key: made[key] for key in ("created", "command")}})
        card = model_card(recipe, done, find_method(recipe.methods[0].name).summary, now, merged=False)
        notes = CheckpointNotes(recipe=recipe.to_dict(), provenance=now, plan=done.to_dict(), card=card)
        save_checkpoint(loaded.model, loaded.tokenizer, out, notes, overwrite=overwrite)
    return result


def _kept_text(loaded: LoadedModel, request: TextRequest, folder: Path) -> TokenBlock:
    """The text, drawn or sampled once and kept in a folder."""
    file = folder / "text.safetensors"
    if file.is_file():
        return TokenBlock.load(file)
    block = load_corpus(loaded.model, loaded.tokenizer, request)
    block.save(file)
    return block


def _told(done: Recovered) -> dict[str, float]:
    return {"before": done.before, "after": done.after, "share": done.share, "held_out": done.held_out, "steps": len(done.losses)}


def gated_plan(
    loaded: LoadedModel,
    statistics: Statistics,
    recipe: Recipe,
    known: dict[str, Curves] | None = None,
    held_out_moments: Statistics | None = None,
) -> RankPlan:
    """The plan of the recipe's first method and budget, with its gate; ``known`` and held-out moments as in :func:`plan`."""
    options = recipe.methods[0]
    made = plan(
        loaded.model,
        options,
        recipe.budgets[0],
        statistics=statistics,
        known=known,
        forecast=False,
        held_out=held_out_moments,
    )
    if options.name in PRUNINGS:
        return made

    def tester() -> UnitTester:
        return UnitTester(loaded.model, statistics, held_out(loaded, recipe.calibration, _GATE_SEQUENCES))

    return gate_plan(loaded.model, statistics, made, options, tester)


def compress_model(
    recipe: Recipe,
    out: Path,
    *,
    statistics: Path | None = None,
    held_out: Path | None = None,
    rank_plan: RankPlan | None = None,
    merged: bool = False,
    overwrite: bool = False,
) -> RankPlan:
    """Load, calibrate, plan, compress and save; what an interrupted call has finished is not done again.

    Finished stages lie in a hidden folder beside ``out`` until the checkpoint stands. They are used only by a call with the
    same recipe and statistics.

    Args:
        recipe: its first method and budget are used.
        out: the checkpoint's folder.
        statistics: a file of moments to use instead of measuring.
        held_out: a file of moments of other text, by which the loss is forecast.
        rank_plan: carried out instead of one made here.
        merged: write an ordinary dense checkpoint.
        overwrite: replace what is there.

    Returns:
        The plan as carried out.
    """
    work = out.with_name(f".{out.name}.work")
    recipe = _mergeable(recipe) if merged else recipe
    digests = [None if file is None else file_digest(file) for file in (statistics, held_out)]
    key = {"recipe": recipe.to_dict(), "statistics": digests[0], "held_out": digests[1]}
    key["plan"] = None if rank_plan is None else rank_plan.to_dict()
    with work_folder(work, key):
        loaded = load(recipe.source)
        found = _measured(loaded, recipe, work) if statistics is None else Statistics.load(statistics)
        found.require_model(model_fingerprint(loaded.model))
        if rank_plan is None and (work / "plan.json").is_file():
            rank_plan = read_plan(work / "plan.json", recipe.methods[0].name)
        elif rank_plan is None:
            unseen = None if held_out is None else Statistics.load(held_out)
            with kept_forecasts(*digests) as known:
                rank_plan = gated_plan(loaded, found, recipe, known, held_out_moments=unseen)
            if recipe.methods[0].propagate or recipe.methods[0].gate != "none":  # otherwise it takes seconds
                write_json(work / "plan.json", rank_plan.to_dict())
        return compress_and_save(loaded, found, recipe, out, rank_plan=rank_plan, merged=merged, overwrite=overwrite, work=work)


def _measured(loaded: LoadedModel, recipe: Recipe, folder: Path) -> Statistics:
    """The statistics that the recipe needs, measured once and kept in a folder."""
    file, needs = folder / "statistics.safetensors", needs_of(recipe.methods, recipe.budgets)
    if file.is_file():
        statistics = Statistics.load(file)
        statistics.require(needs)
        statistics.require_model(model_fingerprint(loaded.model))
        return statistics
    statistics = calibrate(loaded.model, loaded.tokenizer, needs, recipe.calibration, recipe.layers)
    statistics.save(file)
    return statistics


_GATE_SEQUENCES = 8
"""Held-out sequences on which the gate ``kl`` measures each unit."""


def entry_name(options: MethodConfig, budget: BudgetConfig, *, only_budget: bool) -> str:
    """Folder and row name of a method at a budget in a run."""
    name = options.label or (f"{options.name}-oblique" if options.reading == "oblique" else options.name)
    return name if only_budget else f"{name}@{budget.label}"


def _names(recipe: Recipe, options: MethodConfig, budget: BudgetConfig) -> list[str]:
    """The results of a method at a budget: compressed, and recovered if the recipe says so; pruning leaves no layer to train."""
    only_budget = len(recipe.budgets) == 1
    names = [entry_name(options, budget, only_budget=only_budget)]
    if recipe.recovery is not None and options.name in METHODS:
        label = f"{entry_name(options, budget, only_budget=True)}-recovered"
        names.append(entry_name(options.model_copy(update={"label": label}), budget, only_budget=only_budget))
    return names


def run(recipe: Recipe, out: Path, *, overwrite: bool = False) -> Path:
    """Calibrate once, then diagnose, and plan, compress and evaluate with every method; evaluate the dense model; report.

    With a recovery in the recipe every compressed model is also trained and evaluated once more.

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
    needs_of(recipe.methods, recipe.budgets)
    _require_own_folders(recipe)
    _open_folder(recipe, out, overwrite=overwrite)
    loaded = load(recipe.source)
    statistics = _measured(loaded, recipe, out)
    if not (out / "diagnosis.json").is_file():
        fraction = recipe.budgets[0].rank_fraction or 0.5
        subspaces = [options for options in recipe.methods if options.name in METHODS]
        losses = [options for options in subspaces if get_method(options.name).is_loss]
        shown = losses[:1] or subspaces[:1]  # the report draws one forecast; `fasc diagnose` shows any
        diagnose(loaded.model, statistics, shown, rank_fraction=fraction).save(out / "diagnosis.json")
    facts = {key: value for key, value in statistics.meta.items() if key != "provenance"}
    write_json(out / "provenance.json", provenance(model=recipe.source.model, statistics=facts))
    config = recipe.evaluation
    dense_config = config.model_copy(
        update={"benchmarks": tuple(name for name in config.benchmarks if not get_benchmark(name).needs_dense)}
    )
    texts = _Texts(loaded, config)
    known: dict[str, Curves] = {}
    _score(out / DENSE, lambda: loaded, dense_config, None, texts)
    for budget in recipe.budgets:
        for options in recipe.methods:
            one = recipe.model_copy(update={"methods": (options,), "budgets": (budget,), "recovery": None})
            shared = _Shared(loaded, texts, known)
            compressed, *recovered = _names(recipe, options, budget)
            _run_method(one, statistics, out / compressed, shared)
            if recipe.recovery is not None:
                for name in recovered:
                    _run_recovery(one, recipe.recovery, out / compressed, out / name, shared)
    return report(out)


def _require_own_folders(recipe: Recipe) -> None:
    """Refuse a recipe in which two results would have one name: the second would be taken for the first, already done."""
    names = [name for budget in recipe.budgets for options in recipe.methods for name in _names(recipe, options, budget)]
    twice = next((name for name in (DENSE, *names) if [DENSE, *names].count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two results of the recipe would be called `{twice}`", "give each method a `label` of its own")


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
        for stale in out.glob("*/work"):
            rmtree(stale, ignore_errors=True)
    with new_file(file) as scratch:
        scratch.write_text(text, encoding="utf-8")


class _Texts:
    """The held-out text of a run: loaded (or sampled) once, when it is first needed."""

    def __init__(self, dense: LoadedModel, config: EvaluationConfig) -> None:
        self._dense, self._config = dense, config
        self._blocks: list[TokenBlock] | None = None

    def get(self) -> list[TokenBlock]:
        """The windows of each corpus, or none if no benchmark needs text."""
        if self._blocks is None:
            needed = any(get_benchmark(name).needs_text for name in self._config.benchmarks)
            self._blocks = evaluation_texts(*self._dense, self._config) if needed else []
        return self._blocks


class _Shared(NamedTuple):
    """What the methods of a run have in common."""

    dense: LoadedModel
    texts: _Texts
    known: dict[str, Curves]


def _run_method(recipe: Recipe, statistics: Statistics, folder: Path, shared: _Shared) -> None:
    checkpoint = folder / "model"
    if not (folder / "plan.json").is_file():
        work = folder / "work"
        loaded = load(recipe.source)
        start = perf_counter()
        made = gated_plan(loaded, statistics, recipe, shared.known)
        planned = perf_counter()
        done = compress_and_save(loaded, statistics, recipe, checkpoint, rank_plan=made, overwrite=True, work=work)
        seconds = {"plan": planned - start, "compress": perf_counter() - planned}
        write_json(folder / "timing.json", {"seconds": seconds, "provenance": provenance()})
        write_json(folder / "plan.json", done.to_dict())
        rmtree(work, ignore_errors=True)
    source = recipe.source.model_copy(update={"model": str(checkpoint)})
    _score(folder, lambda: load(source), recipe.evaluation, shared.dense.model, shared.texts)


def _run_recovery(recipe: Recipe, config: RecoveryConfig, compressed: Path, folder: Path, shared: _Shared) -> None:
    checkpoint = folder / "model"
    if not (folder / "plan.json").is_file():
        start = perf_counter()
        source = recipe.source.model_copy(update={"model": str(compressed / "model")})
        done = recover_and_save(source, checkpoint, config, dense=shared.dense, overwrite=True)
        seconds = {"recover": perf_counter() - start}
        write_json(folder / "timing.json", {"seconds": seconds, "kl": _told(done), "provenance": provenance()})
        write_json(folder / "plan.json", read_json(compressed / "plan.json"))
    source = recipe.source.model_copy(update={"model": str(checkpoint)})
    _score(folder, lambda: load(source), recipe.evaluation, shared.dense.model, shared.texts)


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
    seen = texts_seen(folder / "model")
    scores = evaluate(loaded.model, loaded.tokenizer, config, dense=dense, texts=texts.get(), seen=seen)
    write_scores(folder / "scores.json", scores, config)


def write_scores(path: Path, scores: Sequence[Score], config: EvaluationConfig) -> None:
    """Write scores with how they were made."""
    made = provenance(evaluation=config.model_dump(mode="json", exclude_none=True))
    write_json(path, {"scores": [score.to_dict() for score in scores], "provenance": made})


def dense_of(checkpoint: str) -> str | None:
    """The model a checkpoint was compressed from, if it says so."""
    found = read_provenance(checkpoint)
    return None if found is None else found.get("model")


def budget_of(checkpoint: str) -> BudgetConfig | None:
    """The budget a checkpoint was compressed under, if it says so in words that this version knows."""
    with suppress(UsageError):
        return read_recipe(Path(checkpoint) / RECIPE_FILE).budgets[0]
    return None


def texts_seen(checkpoint: str | Path) -> frozenset[str]:
    """Digests of the texts a checkpoint was calibrated and trained on, as far as it says so."""
    found = read_provenance(checkpoint) or {}
    digests = [part.get("text_digest") for part in (found.get("statistics", {}), *recoveries(found))]
    return frozenset(digest for digest in digests if digest)
