"""A compressed checkpoint → a recovered one, resumable."""

from pathlib import Path
from typing import Any

import torch

from fasc.compression.options import RecoveryConfig
from fasc.compression.recover import Recovered, recover
from fasc.errors import ModelError
from fasc.model.load import LoadedModel, model_fingerprint
from fasc.model.options import ModelConfig
from fasc.planning.plan import Plan
from fasc.processes import current
from fasc.provenance import digest, provenance
from fasc.pruning import find_method
from fasc.recipe import read_recipe
from fasc.reporting.card import model_card
from fasc.serving.checkpoint import PLAN_FILE, RECIPE_FILE, CheckpointNotes, read_provenance, save_checkpoint
from fasc.stages.compress import load, shared_work_folder
from fasc.stages.plan import require_same_work
from fasc.storage import read_json
from fasc.text.corpus import TextRequest, TokenBlock, load_corpus
from fasc.text.sources import text_key


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
    request = TextRequest(
        corpus=config.corpus or recipe.calibration.corpus,
        sequences=config.sequences,
        sequence_length=config.sequence_length,
        seed=config.seed,
        role="calibration",
        data_dir=config.data_dir or recipe.calibration.data_dir,
    )
    text = text_key(request.corpus, "calibration", request.data_dir)
    key: dict[str, Any] = {"recovery": config.model_dump(mode="json"), "text": text}
    key["models"] = [model_fingerprint(one.model) for one in (loaded, dense)]
    require_same_work(loaded.model, {"recovery": digest([repr(sorted(key.items())).encode()])})
    with shared_work_folder(out, key) as work:
        block = _kept_text(dense, request, work)
        result = recover(loaded.model, dense.model, block.tokens, config, work)
        facts = config.model_dump(mode="json", exclude_none=True) | {"corpus": block.corpus, "tokens": block.tokens.numel()}
        recovery = facts | {"text_digest": block.text_digest, "token_digest": block.token_digest, "kl": summary_of(result)}
        if "recovery" in made:
            recovery["after"] = made["recovery"]
        kept = {key: made[key] for key in ("model", "statistics", "merged", "folded_biases") if key in made}
        loaded.model.to(getattr(torch, read_json(folder / "config.json", finite=False).get("dtype", "float32")))
        now = provenance(**kept | {"recovery": recovery, "compressed": {key: made[key] for key in ("created", "command")}})
        card = model_card(recipe, plan, find_method(plan.method).summary, now, merged=False)
        notes = CheckpointNotes(recipe=recipe.to_dict(), provenance=now, plan=plan.to_dict(), card=card)
        if current().first:
            save_checkpoint(loaded.model, loaded.tokenizer, out, notes, overwrite=overwrite)
        current().wait()
    return result


def _kept_text(loaded: LoadedModel, request: TextRequest, folder: Path) -> TokenBlock:
    """The text, drawn or sampled once and kept in a folder."""
    file = folder / "text.safetensors"
    if current().agreed(file.is_file()):
        return TokenBlock.load(file)
    block = load_corpus(loaded.model, loaded.tokenizer, request)
    if current().first:
        block.save(file)
    return block


def summary_of(result: Recovered) -> dict[str, float]:
    """What a recovery did, as plain JSON values."""
    return {
        "before": result.before,
        "after": result.after,
        "share": result.share,
        "held_out": result.held_out,
        "steps": len(result.losses),
    }
