"""A model, statistics and a plan → a compressed model; and the whole way from text to a checkpoint, resumable."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fasc.compression.compress import carried_out
from fasc.compression.merge import merge
from fasc.errors import StatisticsError, UsageError
from fasc.forecast.cache import kept_forecasts
from fasc.layouts import layouts_named
from fasc.model.load import LoadedModel, load_model, model_fingerprint
from fasc.model.options import LayersConfig, ModelConfig
from fasc.options import size
from fasc.outputs import output
from fasc.planning.needs import needs_for
from fasc.planning.one_width import asks_for_one_width
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.planning.plan import Plan
from fasc.planning.removable import WORDS, require_experts
from fasc.processes import current
from fasc.progress import say
from fasc.provenance import digest, provenance
from fasc.pruning import find_method
from fasc.recipe import Recipe
from fasc.reporting.card import model_card
from fasc.serving.checkpoint import CheckpointNotes, require_own_checkpoint, save_checkpoint
from fasc.serving.pack_quantized import save_pack_quantized
from fasc.serving.quantizer import attach
from fasc.stages.calibrate import calibrate
from fasc.stages.keywords import Corpus, corpus_in, take
from fasc.stages.plan import fitted_statistics, plan_of_recipe, require_same_work, take_method
from fasc.stages.plan import plan as make_plan
from fasc.statistics.moments import Need, Statistics
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.shards import digest_of
from fasc.storage import expanded, work_folder
from fasc.text.sources import text_key

Format = Literal["fasc", "compressed-tensors"]
"""Of a checkpoint."""


@dataclass(frozen=True)
class Compressed:
    """A compressed model, and how it was made."""

    model: PreTrainedModel
    plan: Plan
    """As it was carried out."""

    recipe: Recipe
    provenance: dict[str, Any]
    merged: bool = False
    """Whether it is an ordinary dense model again."""

    tokenizer: PreTrainedTokenizerBase | None = None

    def save(
        self,
        folder: str | Path,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        overwrite: bool = False,
        format: Format = "fasc",
        max_shard_size: str | int | None = None,
    ) -> Path:
        """Write a checkpoint that ``AutoModelForCausalLM.from_pretrained`` loads where fasc is installed.

        Args:
            folder: where it goes.
            tokenizer: to write beside the weights; by default that of the dense model, if it was loaded from somewhere.
            overwrite: replace what is there.
            format: ``compressed-tensors`` for rounded layers that other programs load without fasc.
            max_shard_size: of a file of weights at most, such as ``5GB``; by default that of transformers.

        Raises:
            StorageError: the folder exists and may not be replaced, or there is no space.
            UsageError: the format cannot hold the plan.
        """
        limit = None if max_shard_size is None else size("--max-shard-size", max_shard_size)
        folder = expanded(folder)
        summary = find_method(self.plan.method).summary
        card = model_card(self.recipe, self.plan, summary, self.provenance, merged=self.merged)
        notes = CheckpointNotes(self.recipe.to_dict(), self.provenance, self.plan.to_dict(), card)
        own = tokenizer or self.tokenizer or _tokenizer_of(self.model)
        if own is None:
            say("no tokenizer is saved: the model was made in memory; pass tokenizer= to save one")
        write = save_checkpoint if format == "fasc" else save_pack_quantized
        write(self.model, own, folder, notes, overwrite=overwrite, max_shard_size=limit)
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        private: bool | None = None,
        token: str | None = None,
        format: Format = "fasc",
    ) -> str:
        """Upload the checkpoint that :meth:`save` writes, our model card included; it loads from the hub as from a folder.

        ``model.push_to_hub`` of transformers would write a card of its own over ours.

        Args:
            repo_id: ``owner/name``; made if it does not exist.
            tokenizer: as for :meth:`save`.
            private: of a repository that is made; by default what the owner's settings say.
            token: of the hub; by default the one that was logged in with.
            format: as for :meth:`save`.

        Returns:
            The address of the commit.

        Raises:
            UsageError: the hub refused.
        """
        hub = HfApi(token=token)
        with TemporaryDirectory(prefix="fasc-") as scratch:
            folder = self.save(Path(scratch) / "model", tokenizer=tokenizer, format=format)
            try:
                hub.create_repo(repo_id, private=private, exist_ok=True)
                done = hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Compressed with fasc")
            except (HfHubHTTPError, HFValidationError, OSError) as problem:
                first = str(problem).strip().splitlines()[0][:200]
                raise UsageError(
                    f"`{repo_id}` could not be uploaded: {first}", "log in with `hf auth login`, or pass token="
                ) from problem
        return str(done.commit_url)


def _tokenizer_of(model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
    """The one of the folder or hub id that the model was loaded from; none if it was made in memory."""
    if not model.name_or_path:
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise UsageError(f"the tokenizer of `{model.name_or_path}` cannot be loaded", "pass tokenizer= to save") from problem
    return tokenizer


def compress(model: PreTrainedModel, statistics: Statistics, plan: Plan | None = None, **options: Any) -> Compressed:
    """Compress a model in place.

    Args:
        model: the dense model that the statistics were measured on; changed.
        statistics: from :func:`fasc.collect`.
        plan: from :func:`fasc.plan`.
        **options: without a plan, those of :func:`fasc.plan`: ``param_fraction=0.8``, ``method=``, ….

    Returns:
        The model with its plan; ``.save(folder)`` writes a checkpoint.

    Raises:
        ModelError: the plan does not fit the model.
        StatisticsError: the statistics are of another model, or lack a moment.
        NonFiniteError: a new weight is NaN or infinite; load the model again then.
    """
    if plan is not None and options:
        raise UsageError(
            f"a plan and `{next(iter(options))}` were given", "a plan holds its budget and options: give one of them"
        )
    statistics = fitted_statistics(statistics, model)
    chosen = plan or make_plan(model, statistics, **options)
    recipe = _recipe_of(model, statistics, chosen)
    return carry_out_recipe(LoadedModel(model, None), statistics, recipe, chosen)


def _recipe_of(model: PreTrainedModel, statistics: Statistics, plan: Plan) -> Recipe:
    """What was told, as far as the parts know it."""
    budget = BudgetConfig.model_validate(dict(plan.budget or {}))
    return Recipe(
        source=ModelConfig(model=model.name_or_path or "a model in memory"),
        calibration=statistics.calibration,
        methods=(plan.options,),
        budgets=(budget,),
    )


def carry_out_recipe(
    loaded: LoadedModel,
    statistics: Statistics,
    recipe: Recipe,
    plan: Plan,
    *,
    merged: bool = False,
    work: Path | None = None,
) -> Compressed:
    """Compress the loaded model in place by a plan.

    Args:
        loaded: the dense model.
        statistics: measured on it.
        recipe: of the run.
        plan: what is done.
        merged: make an ordinary dense model of it again.
        work: folder in which an interrupted compression with propagation goes on.
    """
    shared = None if merged else work  # merging goes by the statistics of all that is left
    done, left = carried_out(loaded.model, statistics, plan, propagate=plan.options.propagate, work=work, shared=shared)
    damping = find_method(plan.method).options.model_validate(plan.options.own).damping
    folded = merge(loaded.model, left, damping) if merged else []
    attach(loaded.model)
    facts = {key: value for key, value in statistics.meta.items() if key != "provenance"}
    made = provenance(model=recipe.source.model, statistics=facts, merged=merged, folded_biases=folded)
    return Compressed(loaded.model, done, recipe, made, merged, loaded.tokenizer)


def require_rounding_alone(options: MethodConfig) -> None:
    """Refuse a plan that compressed-tensors could not hold, before the work.

    Raises:
        UsageError: layers may be factored or narrowed, or are not rounded.
    """
    if not options.bits or options.layouts != ("dense",):
        raise UsageError("compressed-tensors holds rounded layers and no others", "give --layouts dense --bits 4,8")


def mergeable(recipe: Recipe) -> Recipe:
    """Without channel pruning, unless that is the same everywhere: an ordinary checkpoint has one width for all blocks."""
    first, *others = recipe.methods
    if first.bits:
        raise UsageError("weights of few bits cannot be merged into an ordinary checkpoint", "leave --bits or --merge out")
    if asks_for_one_width(first):
        return recipe
    names = first.layouts or tuple(layout.name for layout in layouts_named(None))
    layouts = tuple(name for name in names if name not in WORDS)
    return recipe.model_copy(update={"methods": (first.but(layouts=layouts), *others)})


def compress_checkpoint(
    model: str | Path,
    corpus: Corpus = "self",
    *,
    out: str | Path,
    method: str = "fasc",
    statistics: str | Path | None = None,
    merge: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Compressed:
    """All of it: load, calibrate, plan, compress and save. What an interrupted call has finished is not done again.

    Args:
        model: a hub id, a Hugging Face folder, a .gguf file, or the alias ``smollm2-135m``.
        corpus: the calibration text, as for :func:`fasc.collect`.
        out: the checkpoint's folder.
        method: a registered method.
        statistics: a file of moments to use instead of measuring.
        merge: write an ordinary dense checkpoint.
        overwrite: replace what is there.
        **options: one budget (``param_fraction=0.8``), and fields of ``CalibrationConfig``, ``LayersConfig``, ``ModelConfig``,
            ``BudgetConfig``, ``MethodConfig`` and of the method itself.

    Raises:
        FascError: any stage's own.
    """
    if statistics is not None:
        require_no_text([name for name in CalibrationConfig.model_fields if name in options] + ["corpus"] * (corpus != "self"))
    recipe = Recipe(
        source=take(ModelConfig, options, model=str(model)),
        calibration=take(CalibrationConfig, options, corpus=corpus_in(corpus)),
        layers=take(LayersConfig, options),
        budgets=(take(BudgetConfig, options),),
        methods=(take_method(method, options),),
    )
    file = None if statistics is None else expanded(statistics)
    sources = (recipe.source.model, file, recipe.calibration.corpus)
    with output(out, overwrite=overwrite, inputs=sources, folder=True, owned=require_own_checkpoint) as target:
        return compress_recipe(recipe, target, statistics=file, merged=merge, overwrite=overwrite)


def require_no_text(given: Sequence[str]) -> None:
    """Refuse what says how to measure, beside a file of what was measured.

    Args:
        given: fields of :class:`~fasc.statistics.options.CalibrationConfig`.

    Raises:
        UsageError: there is one.
    """
    if given:
        raise UsageError(f"`{given[0]}` means nothing beside statistics, which hold their own text", f"leave `{given[0]}` out")


def compress_recipe(  # noqa: PLR0913 - a source each, and switches
    recipe: Recipe,
    out: Path,
    *,
    statistics: Path | None = None,
    held_out: Path | None = None,
    plan: Plan | None = None,
    merged: bool = False,
    overwrite: bool = False,
    format: Format = "fasc",
    max_shard_size: int | None = None,
) -> Compressed:
    """Load, calibrate, plan, compress and save; what an interrupted call has finished is not done again.

    Finished stages lie in a hidden folder beside ``out`` until the checkpoint stands. They are used only by a call with the
    same recipe and statistics.

    Args:
        recipe: its first method and budget are used.
        out: the checkpoint's folder.
        statistics: a file of moments to use instead of measuring.
        held_out: a file of moments of other text, by which the loss is forecast.
        plan: carried out instead of one made here.
        merged: write an ordinary dense checkpoint.
        overwrite: replace what is there.
        format: of the checkpoint.
        max_shard_size: bytes of a file of its weights at most.
    """
    if plan is None and format == "compressed-tensors":
        require_rounding_alone(recipe.methods[0])
    recipe = mergeable(recipe) if merged else recipe
    if plan is not None:
        budgets = (BudgetConfig.model_validate(dict(plan.budget)),) if plan.budget else recipe.budgets
        recipe = recipe.model_copy(update={"methods": (plan.options,), "budgets": budgets})
    needs = needs_for(recipe.methods[0], recipe.budgets[0])
    digests = [None if file is None else digest_of(file) for file in (statistics, held_out)]
    calibration = recipe.calibration
    key = {"recipe": recipe.to_dict(), "statistics": digests[0], "held_out": digests[1]}
    key["text"] = None if statistics is not None else text_key(calibration.corpus, "calibration", calibration.data_dir)
    key["plan"] = None if plan is None else plan.to_dict()
    if recipe.methods[0].propagate and current().count > 1:
        raise UsageError("--propagate goes from block to block, which processes cannot share", "leave --nproc or --propagate out")
    with shared_work_folder(out, key) as work:
        loaded = load(recipe.source)
        require_same_work(loaded.model, {"options": digest([repr(sorted(key.items())).encode()])})
        require_experts(loaded.model, recipe.methods[0].layouts)
        moments = measured(loaded, recipe, needs, work) if statistics is None else Statistics.load(statistics)
        moments = fitted_statistics(moments, loaded.model)
        recipe = recipe.model_copy(update={"calibration": moments.calibration})
        if plan is None:
            moments.require(needs)
            plan = _planned(loaded, moments, recipe, digests, held_out, work)
        small = carry_out_recipe(loaded, moments, recipe, plan, merged=merged, work=work)
        if current().first:
            small.save(out, overwrite=overwrite, format=format, max_shard_size=max_shard_size)
        current().wait()
    return small


def _planned(
    loaded: LoadedModel,
    moments: Statistics,
    recipe: Recipe,
    digests: Sequence[str | None],
    held_out: Path | None,
    work: Path,
) -> Plan:
    """The plan of a recipe, or the one that an interrupted call has left."""
    file, options = work / "plan.json", recipe.methods[0]
    if current().agreed(file.is_file()):
        return Plan.load(file)
    unseen = None if held_out is None else Statistics.load(held_out)
    with kept_forecasts(*digests) as known:
        plan = plan_of_recipe(loaded, moments, recipe, known, unseen)
    if current().first and (options.propagate or options.selection != "none"):  # otherwise it takes seconds
        plan.save(file)
    return plan


@contextmanager
def shared_work_folder(out: Path, key: Mapping[str, Any]) -> Iterator[Path]:
    """The hidden folder of unfinished work beside a result; the first process makes and removes it, the others find it there."""
    current().require_one_machine("unfinished work")
    folder = out.with_name(f".{out.name}.work")
    if current().first:
        with work_folder(folder, key) as work:
            current().wait()
            yield work
    else:
        current().wait()
        yield folder


def load(source: ModelConfig) -> LoadedModel:
    """Load the model of a recipe."""
    return load_model(source.model, dtype=source.dtype, device=source.device, device_map=source.device_map)


def measured(loaded: LoadedModel, recipe: Recipe, needs: frozenset[Need], folder: Path) -> Statistics:
    """The statistics that a recipe needs, measured once and kept in a folder."""
    file = folder / "statistics.safetensors"
    kept = _kept(file, needs, loaded)
    if current().agreed(kept is not None):
        return Statistics.load(file) if kept is None else kept
    made = calibrate(loaded, needs, recipe.calibration, recipe.layers)
    if current().first:
        made.save(file)
    current().wait()
    return made if current().count == 1 else Statistics.load(file)  # only the first process was given the moments


def _kept(file: Path, needs: frozenset[Need], loaded: LoadedModel) -> Statistics | None:
    """What an earlier call has measured; nothing where it is damaged, or of a model that has changed since."""
    if not file.is_file():
        return None
    try:
        statistics = Statistics.load(file)
        statistics.require(needs)
        statistics.require_model(model_fingerprint(loaded.model))
    except StatisticsError:
        return None
    return statistics


def needs_of(methods: tuple[MethodConfig, ...], budgets: tuple[BudgetConfig, ...] | None = None) -> frozenset[Need]:
    """Union of what methods must be given for budgets, or for any budget.

    Raises:
        UnknownNameError, UsageError, BudgetError: a method does not exist or cannot serve a budget.
    """
    asked: tuple[BudgetConfig | None, ...] = (None,) if budgets is None else budgets
    return frozenset().union(*(needs_for(options, budget) for options in methods for budget in asked))
