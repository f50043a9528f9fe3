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
from fasc.evaluation.evaluate import evaluate as score
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import get_benchmark
from fasc.evaluation.text import evaluation_texts
from fasc.methods import METHODS, get_method
from fasc.model.load import LoadedModel
from fasc.planning.alternatives import Curves
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.progress import say
from fasc.provenance import provenance
from fasc.recipe import Recipe, read_recipe
from fasc.reporting.entries import DENSE
from fasc.reporting.report import report
from fasc.reporting.scores import write_scores
from fasc.stages.compress import carry_out_recipe, load, measured, needs_of
from fasc.stages.diagnose import diagnose
from fasc.stages.evaluate import dense_config, texts_seen
from fasc.stages.plan import plan_of_recipe
from fasc.stages.recover import recover_checkpoint, summary_of
from fasc.statistics.moments import Statistics
from fasc.storage import new_file, read_json, write_json
from fasc.text.corpus import TokenBlock


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
        path = Path(recipe)
        recipe, out = read_recipe(path), out or Path("runs") / path.stem
    out = Path(out or "runs/recipe")
    needs = needs_of(recipe.methods, recipe.budgets)
    _require_own_folders(recipe)
    _open_folder(recipe, out, overwrite=overwrite)
    loaded = load(recipe.source)
    statistics = measured(loaded, recipe, needs, out)
    if not (out / "diagnosis.json").is_file():
        _diagnose(loaded, statistics, recipe, out / "diagnosis.json")
    facts = {key: value for key, value in statistics.meta.items() if key != "provenance"}
    write_json(out / "provenance.json", provenance(model=recipe.source.model, statistics=facts))
    texts = _Texts(loaded, recipe.evaluation)
    shared = _Shared(loaded, texts, {})
    _score(out / DENSE, lambda: loaded, dense_config(recipe.evaluation), None, texts)
    for budget in recipe.budgets:
        for options in recipe.methods:
            one = recipe.model_copy(update={"methods": (options,), "budgets": (budget,), "recovery": None})
            compressed, *recovered = _names(recipe, options, budget)
            _run_method(one, statistics, out / compressed, shared)
            if recipe.recovery is not None:
                for name in recovered:
                    _run_recovery(one, recipe.recovery, out / compressed, out / name, shared)
    return report(out)


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
        made = plan_of_recipe(loaded, statistics, recipe, shared.known)
        planned = perf_counter()
        small = carry_out_recipe(loaded, statistics, recipe, made, work=work)
        small.save(checkpoint, overwrite=True)
        seconds = {"plan": planned - start, "compress": perf_counter() - planned}
        write_json(folder / "timing.json", {"seconds": seconds, "provenance": provenance()})
        small.plan.save(folder / "plan.json")
        rmtree(work, ignore_errors=True)
    source = recipe.source.model_copy(update={"model": str(checkpoint)})
    _score(folder, lambda: load(source), recipe.evaluation, shared.dense.model, shared.texts)


def _run_recovery(recipe: Recipe, config: RecoveryConfig, compressed: Path, folder: Path, shared: _Shared) -> None:
    checkpoint = folder / "model"
    if not (folder / "plan.json").is_file():
        start = perf_counter()
        source = recipe.source.model_copy(update={"model": str(compressed / "model")})
        result = recover_checkpoint(source, checkpoint, config, dense=shared.dense, overwrite=True)
        seconds = {"recover": perf_counter() - start}
        write_json(folder / "timing.json", {"seconds": seconds, "kl": summary_of(result), "provenance": provenance()})
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
    scores = score(loaded.model, loaded.tokenizer, config, dense=dense, texts=texts.get(), seen=seen)
    write_scores(folder / "scores.json", scores, config)
