"""A compressed checkpoint → a recovered one, resumable."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fasc.compression.options import RecoveryConfig
from fasc.compression.recover import Recovered, recover
from fasc.errors import CorpusError, FascError, ModelError
from fasc.model.load import LoadedModel, model_fingerprint
from fasc.model.options import ModelConfig
from fasc.planning.plan import Plan
from fasc.processes import current
from fasc.progress import say
from fasc.provenance import digest, provenance, recoveries
from fasc.pruning import find_method
from fasc.recipe import read_recipe
from fasc.reporting.card import model_card
from fasc.serving.checkpoint import PLAN_FILE, RECIPE_FILE, CheckpointNotes, read_provenance, save_checkpoint
from fasc.stages.compress import load, shared_work_folder
from fasc.stages.plan import require_same_work
from fasc.statistics.options import CalibrationConfig
from fasc.storage import read_json
from fasc.text.corpus import TextRequest, TokenBlock, load_corpus
from fasc.text.sources import SELF, text_key


def recover_checkpoint(
    source: ModelConfig, out: Path, config: RecoveryConfig, *, dense: str | LoadedModel | None = None, overwrite: bool = False
) -> Recovered:
    """Train the replaced layers of a checkpoint towards the dense model, and write a new checkpoint.

    Trains in float32 and writes the precision that the checkpoint has. One sequence in sixteen is held out (see
    :func:`~fasc.compression.recover.recover`). A call that is killed leaves its text and the state of its training, at most a few
    minutes old, in a hidden folder beside ``out``; the same call goes on from there.

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
    plan = Plan.load(folder / PLAN_FILE)
    loaded = load(source.model_copy(update={"dtype": "float32"}))
    if not isinstance(dense, LoadedModel):
        dense = load(
            recipe.source.model_copy(update={"model": dense or made["model"], "device": source.device, "device_map": None})
        )
    draw = draw_for(config, recipe.calibration, recoveries(made))
    key: dict[str, Any] = {"recovery": config.model_dump(mode="json"), "text": draw.key, "skip": draw.skip}
    key["models"] = [model_fingerprint(one.model) for one in (loaded, dense)]
    require_same_work(loaded.model, {"recovery": digest([repr(sorted(key.items())).encode()])})
    with shared_work_folder(out, key) as work:
        block, unread = kept_text(dense, draw, work)
        if not unread:
            say("warning: the tokens that are held out are of the text that calibrated: other text costs more")
        result = recover(loaded.model, dense.model, block.tokens, config, work)
        facts = config.model_dump(mode="json", exclude_none=True) | {"corpus": block.corpus, "tokens": block.tokens.numel()}
        facts |= {"skip": draw.skip if unread else 0, "held_out_is_unread": unread}
        recovery = facts | {"text_digest": block.text_digest, "token_digest": block.token_digest, "kl": summary_of(result)}
        if "recovery" in made:
            recovery["after"] = made["recovery"]
        kept = {key: made[key] for key in ("model", "statistics", "merged", "folded_biases") if key in made}
        loaded.model.to(getattr(torch, read_json(folder / "config.json", finite=False).get("dtype", "float32")))
        now = provenance(**kept | {"recovery": recovery, "compressed": {key: made[key] for key in ("created", "command")}})
        card = model_card(recipe, plan, find_method(plan.method).summary, now, merged=False)
        told = recipe.model_copy(update={"recovery": config}).to_dict()
        notes = CheckpointNotes(recipe=told, provenance=now, plan=plan.to_dict(), card=card)
        if current().first:
            save_checkpoint(loaded.model, loaded.tokenizer, out, notes, overwrite=overwrite)
        current().wait()
    return result


@dataclass(frozen=True, slots=True)
class Draw:
    """Text to train on, and what of the draw has been read before."""

    request: TextRequest
    key: str
    """Of the text."""

    skip: int
    """Sequences at the head of the draw by which the model was calibrated, or trained before."""

    unread: bool
    """Whether what comes after them is known to be other text."""


def draw_for(config: RecoveryConfig, calibration: CalibrationConfig, before: Sequence[Mapping[str, Any]]) -> Draw:
    """The text of a recovery, such that what is held out of it has not been read.

    A draw from the calibration's text goes on where that ended. With another seed or length it may hold the same text again, and
    says so.

    Args:
        config: of the recovery.
        calibration: of the checkpoint.
        before: what earlier recoveries of the checkpoint say of themselves.

    Raises:
        UnknownNameError, CorpusError: the text cannot be found or read.
    """
    request = TextRequest(
        corpus=config.corpus or calibration.corpus,
        sequences=config.sequences,
        sequence_length=config.sequence_length,
        seed=config.seed,
        role="calibration",
        data_dir=config.data_dir or calibration.data_dir,
    )
    key, known = text_key(request.corpus, "calibration", request.data_dir), ""
    with suppress(FascError):  # the calibration's may be gone
        known = text_key(calibration.corpus, "calibration", request.data_dir)
    if request.corpus == SELF:  # another text for every seed
        taken = [calibration.seed] * (key == known) + [int(one["seed"]) for one in before if one.get("corpus") == SELF]
        return Draw(replace(request, seed=max([config.seed, *(seed + 1 for seed in taken)])), key, 0, unread=True)
    if key == known:
        request = replace(request, chat_template=calibration.chat_template)
    read = [calibration.model_dump()] * (key == known) + [one for one in before if one.get("corpus") == request.corpus]
    same = [one for one in read if (one["seed"], one["sequence_length"]) == (request.seed, request.sequence_length)]
    skip = max((int(one.get("skip", 0)) + int(one["sequences"]) for one in same), default=0)
    return Draw(request, key, skip, unread=len(same) == len(read))


def kept_text(loaded: LoadedModel, draw: Draw, folder: Path) -> tuple[TokenBlock, bool]:
    """The text, drawn or sampled once and kept in a folder, and whether its held-out part is unread."""
    file, again = folder / "text.safetensors", folder / "text-again.safetensors"
    for kept, unread in ((file, draw.unread), (again, False)):
        if current().agreed(kept.is_file()):
            return TokenBlock.load(kept), unread
    whole = replace(draw.request, sequences=draw.skip + (draw.request.sequences or 0))
    try:
        block, unread = load_corpus(loaded.model, loaded.tokenizer, whole), draw.unread
        block = replace(block, tokens=block.tokens[draw.skip :])
    except CorpusError:
        if not draw.skip:
            raise
        block, unread = load_corpus(loaded.model, loaded.tokenizer, draw.request), False  # too short for other text
    if current().first:
        block.save(again if draw.unread and not unread else file)
    return block, unread


def summary_of(result: Recovered) -> dict[str, float]:
    """What a recovery did, as plain JSON values."""
    return {
        "before": result.before,
        "after": result.after,
        "share": result.share,
        "held_out": result.held_out,
        "steps": len(result.losses),
    }
