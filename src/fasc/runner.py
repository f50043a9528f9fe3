"""Recipes: the verbs in a row, resumable. What is whole on disk is not done again."""

from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from time import perf_counter
from typing import NamedTuple

import tomli_w
from transformers import PreTrainedModel

from fasc.compression.options import RecoveryConfig
from fasc.errors import StorageError, UsageError
from fasc.evaluation.evaluate import Record
from fasc.evaluation.evaluate import evaluate as score
from fasc.evaluation.options import EvaluationConfig, SpeedConfig
from fasc.evaluation.registry import get_benchmark
from fasc.evaluation.samples import continuations
from fasc.evaluation.speed import speeds_in_turn
from fasc.evaluation.text import evaluation_texts
from fasc.methods import METHODS, get_method
from fasc.model.load import LoadedModel, model_of_config
from fasc.outputs import is_ours
from fasc.planning.candidates import Curves
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.progress import say
from fasc.provenance import provenance
from fasc.recipe import Recipe, read_recipe
from fasc.reporting.entries import DENSE, RIVAL, Rival
from fasc.reporting.report import report
from fasc.reporting.scores import ITEMS, write_outcomes, write_scores
from fasc.runfolder import require_name, run_folder
from fasc.serving.checkpoint import is_whole, require_own_checkpoint
from fasc.stages.compress import carry_out_recipe, load, measured, needs_of
from fasc.stages.diagnose import diagnose
from fasc.stages.evaluate import dense_config, texts_seen
from fasc.stages.plan import plan_of_recipe
from fasc.stages.recover import recover_checkpoint, summary_of
from fasc.statistics.moments import Need, Statistics
from fasc.storage import expanded, new_file, read_json, write_json
from fasc.text.corpus import TokenBlock
from fasc.text.sources import text_key


def run(recipe: Recipe | str | Path, out: str | Path | None = None, *, overwrite: bool = False) -> Path:
    """Calibrate once, then diagnose, and plan, compress and evaluate with every method; evaluate the dense model; report.

    With a recovery in the recipe every compressed model is also trained and evaluated once more.

    A run that was interrupted goes on: what is whole on disk is not done again.

    Args:
        recipe: everything the run is told, or the path of a TOML file.
        out: its folder; one that holds another recipe is refused. By default ``runs/`` and the file's name.
        overwrite: start over even if the folder holds a run.

    Returns:
        The path of the report.

    Raises:
        StorageError: the folder holds something else.
        FascError: any stage's own.
    """
    if not isinstance(recipe, Recipe):
        path = expanded(recipe)
        recipe, out = read_recipe(path), out or Path("runs") / path.stem
    needs = needs_of(recipe.methods, recipe.budgets)
    names = _require_own_folders(recipe)
    out = expanded(out or "runs/recipe")
    identity = {"recipe": recipe.to_dict(), "texts": _texts_of(recipe)}
    for rival in recipe.rivals:
        model_of_config(rival)  # refused before the work
    read = (recipe.source.model, recipe.calibration.corpus, recipe.evaluation.corpus, *recipe.rivals)
    entries = [*_FILES, *names]
    with run_folder(out, identity, entries, overwrite=overwrite, inputs=read, owned=_require_ours) as (folder, goes_on):
        if goes_on:
            say(f"{out} holds this run already: going on where it stopped")
        _carry_out(recipe, needs, folder)
    return out / "report.md"


_FILES = (
    "recipe.toml",
    "provenance.json",
    "diagnosis.json",
    "statistics.safetensors",
    "figures",
    "report.md",
    "report.html",
    DENSE,
)
"""What a run keeps beside its results."""


def _texts_of(recipe: Recipe) -> dict[str, str]:
    """Digests of what the texts hold: a run whose corpus file has changed since is another run."""
    calibration, evaluation, recovery = recipe.calibration, recipe.evaluation, recipe.recovery
    keys = {"calibration": text_key(calibration.corpus, "calibration", calibration.data_dir)}
    if any(get_benchmark(name).needs_text for name in evaluation.benchmarks):
        keys["evaluation"] = text_key(evaluation.corpus, "evaluation", evaluation.data_dir)
    if recovery is not None and recovery.corpus is not None:
        keys["recovery"] = text_key(recovery.corpus, "calibration", recovery.data_dir)
    return keys


def _carry_out(recipe: Recipe, needs: frozenset[Need], out: Path) -> None:
    with new_file(out / "recipe.toml") as scratch:
        scratch.write_text(tomli_w.dumps(recipe.to_dict()), encoding="utf-8")
    loaded = load(recipe.source)
    statistics = measured(loaded, recipe, needs, out)
    if not (out / "diagnosis.json").is_file():
        _diagnose(loaded, statistics, recipe, out / "diagnosis.json")
    facts = {key: value for key, value in statistics.meta.items() if key != "provenance"}
    write_json(out / "provenance.json", provenance(model=recipe.source.model, statistics=facts))
    shared = _Shared(loaded, _Texts(loaded, recipe.evaluation), {})
    _look_at(out / DENSE, lambda: loaded, recipe.evaluation, shared)
    for budget in recipe.budgets:
        for options in recipe.methods:
            one = recipe.model_copy(update={"methods": (options,), "budgets": (budget,), "recovery": None})
            compressed, *recovered = _names(recipe, options, budget)
            _run_method(one, statistics, out / compressed, shared)
            if recipe.recovery is not None:
                for name in recovered:
                    _run_recovery(one, recipe.recovery, out / compressed, out / name, shared)
    for rival in recipe.rivals:
        _run_rival(recipe, rival, out / _rival_name(rival))
    report(out)


def _rival_name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2]


def _run_rival(recipe: Recipe, model: str, folder: Path) -> None:
    """Score another dense model, by its own tokenizer."""
    if (folder / "scores.json").is_file():
        return
    loaded = load(recipe.source.model_copy(update={"model": model}))
    parameters = loaded.model.num_parameters()
    say(f"evaluating {folder.name}")
    record = Record()
    scores = score(loaded.model, loaded.tokenizer, dense_config(recipe.evaluation), record=record)
    weighs = Rival(model=model, parameters=parameters, bytes=parameters * loaded.model.dtype.itemsize)
    write_json(folder / RIVAL, weighs.model_dump())
    write_outcomes(folder / ITEMS, record.outcomes)
    write_scores(folder / "scores.json", scores, recipe.evaluation)


def _diagnose(loaded: LoadedModel, statistics: Statistics, recipe: Recipe, file: Path) -> None:
    """The report draws one forecast; ``fasc diagnose`` shows any."""
    subspaces = [options.name for options in recipe.methods if options.name in METHODS]
    losses = [name for name in subspaces if get_method(name).is_loss]
    fraction = recipe.budgets[0].rank_fraction or 0.5
    diagnose(loaded.model, statistics, losses[:1] or subspaces[:1], rank_fraction=fraction).save(file)


def entry_name(options: MethodConfig, budget: BudgetConfig, *, only_budget: bool) -> str:
    """Folder and row name of a method at a budget in a run."""
    name = options.label or "-".join([options.name, *(str(v) for v in options.own.values() if isinstance(v, str))])
    return name if only_budget else f"{name}@{budget.label}"


def _names(recipe: Recipe, options: MethodConfig, budget: BudgetConfig) -> list[str]:
    """The results of a method at a budget: compressed, and recovered if the recipe says so; pruning leaves no layer to train."""
    only_budget = len(recipe.budgets) == 1
    names = [entry_name(options, budget, only_budget=only_budget)]
    if recipe.recovery is not None and options.name in METHODS:
        label = f"{entry_name(options, budget, only_budget=True)}-recovered"
        names.append(entry_name(options.but(label=label), budget, only_budget=only_budget))
    return names


def _require_own_folders(recipe: Recipe) -> list[str]:
    """The names of all results, each of them a folder of its own.

    Raises:
        UsageError: a name is no name, or two results share one.
    """
    names = [name for budget in recipe.budgets for options in recipe.methods for name in _names(recipe, options, budget)]
    names += [_rival_name(model) for model in recipe.rivals]
    for name in names:
        require_name(name, reserved=_FILES)
    folded = [name.casefold() for name in names]  # some file systems do not tell cases apart
    twice = next((name for name in names if folded.count(name.casefold()) > 1), None)
    if twice is not None:
        raise UsageError(f"two results of the recipe would be called `{twice}`", "give each method a `label` of its own")
    return names


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
    if not _is_done(folder):
        work = folder / "work"
        loaded = load(recipe.source)
        start = perf_counter()
        made = plan_of_recipe(loaded, statistics, recipe, shared.known)
        planned = perf_counter()
        small = carry_out_recipe(loaded, statistics, recipe, made, work=work)
        small.save(checkpoint, overwrite=True)
        seconds = {"plan": planned - start, "compress": perf_counter() - planned}
        write_json(folder / "timing.json", {"seconds": seconds, "provenance": provenance()})
        small.plan.save(folder / "plan.json")
        rmtree(work, ignore_errors=True)
    source = recipe.source.model_copy(update={"model": str(checkpoint)})
    _look_at(folder, lambda: load(source), recipe.evaluation, shared)


def _run_recovery(recipe: Recipe, config: RecoveryConfig, compressed: Path, folder: Path, shared: _Shared) -> None:
    checkpoint = folder / "model"
    if not _is_done(folder):
        start = perf_counter()
        source = recipe.source.model_copy(update={"model": str(compressed / "model")})
        result = recover_checkpoint(source, checkpoint, config, dense=shared.dense, overwrite=True)
        seconds = {"recover": perf_counter() - start}
        write_json(folder / "timing.json", {"seconds": seconds, "kl": summary_of(result), "provenance": provenance()})
        write_json(folder / "plan.json", read_json(compressed / "plan.json"))
    source = recipe.source.model_copy(update={"model": str(checkpoint)})
    _look_at(folder, lambda: load(source), recipe.evaluation, shared)


_RESULT = ("plan.json", "scores.json", ITEMS, "samples.json", "speed.json", "timing.json", RIVAL, "work")
"""What a result of a run consists of, beside its checkpoint."""


def _require_ours(place: Path) -> None:
    """See that a folder of a run holds what a run writes.

    Raises:
        StorageError: names what is not ours.
    """
    for entry in sorted(place.iterdir()):
        if entry.name == "model" and entry.is_dir():
            require_own_checkpoint(entry)
        elif entry.name not in _RESULT and not (place.name == "figures" and (entry.is_dir() or is_ours(entry))):
            raise StorageError(f"`{entry}` was not written by this run", "move it elsewhere, or choose another --out")


def _is_done(folder: Path) -> bool:
    """Whether a result stands whole; what a damaged or removed checkpoint was scored is forgotten with it."""
    if (folder / "plan.json").is_file() and is_whole(folder / "model"):
        return True
    if (folder / "model").is_dir():
        require_own_checkpoint(folder / "model")
    for file in ("plan.json", "scores.json", ITEMS, "samples.json", "speed.json"):
        (folder / file).unlink(missing_ok=True)
    rmtree(folder / "model", ignore_errors=True)
    return False


def _look_at(folder: Path, get_model: Callable[[], LoadedModel], config: EvaluationConfig, shared: _Shared) -> None:
    """Score a model, and where the recipe asks for it let it write and time it; each once."""
    dense = folder.name == DENSE
    wanted = (
        {"scores.json"}
        | ({"samples.json"} if config.prompts else set())
        | ({"speed.json"} if config.speed and not dense else set())
    )
    missing = {name for name in wanted if not (folder / name).is_file()}
    if not missing:
        return
    loaded = get_model()
    say(f"evaluating {folder.name}")
    if "scores.json" in missing:
        chosen = dense_config(config) if dense else config
        reference = None if dense else shared.dense.model
        seen = texts_seen(folder / "model")
        record = Record(seen)
        scores = score(loaded.model, loaded.tokenizer, chosen, dense=reference, texts=shared.texts.get(), record=record)
        write_outcomes(folder / ITEMS, record.outcomes)
        write_scores(folder / "scores.json", scores, config)
    if "samples.json" in missing:
        rows = continuations(loaded.model, loaded.tokenizer, config.prompts, config.continuation)
        write_json(folder / "samples.json", {"samples": rows})
    if "speed.json" in missing:
        comparisons = speeds_in_turn(shared.dense.model, loaded.model, _speed_config(loaded.model))
        write_json(folder / "speed.json", {"comparisons": [one.to_dict() for one in comparisons]})


def _speed_config(model: PreTrainedModel) -> SpeedConfig:
    """A short timing, within the positions that the model has."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 512
    prefill, prompt = min(256, positions), min(32, max(1, positions // 2))
    return SpeedConfig(prefill=prefill, prompt=prompt, decode=max(1, min(32, positions - prompt)), batches=(1,), repeats=3)
