"""The model card that goes into a checkpoint."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fasc.model.embedded import EMBEDDED
from fasc.model.untouched import in_words
from fasc.planning.plan import Plan
from fasc.provenance import recoveries
from fasc.recipe import Recipe

_CARD = """---
library_name: transformers
{base_model}tags: [fasc, low-rank, compression]
---

# {base}, compressed with fasc ({method}{trained})

{method_summary} Made by [fasc](https://arxiv.org/abs/2601.07197) {version}; `fasc_recipe.toml`, `fasc_plan.json` and
`fasc_provenance.json` in this folder say exactly how.

| | |
|---|--:|
| rank fraction | {rank_fraction} |
| parameters of the compressed layers | {param_fraction:.1%} of dense |
| parameters of the model | {parameters:,} ({model_fraction:.1%} of dense) |
| weights | {megabytes:,.0f} MB (dense: {dense_megabytes:,.0f} MB) |
| not touched | {outside} |
| calibration | {sequences} × {sequence_length} tokens of `{corpus}`, {labels} labels |
{forecast}{recovery}
## Load

```python
{load}
```
"""

_LOAD_FACTORED = """import fasc  # registers the format; no remote code
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""

_LOAD_DENSE = """from transformers import AutoModelForCausalLM, AutoTokenizer  # an ordinary dense checkpoint

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")"""


def model_card(recipe: Recipe, plan: Plan, summary: str, provenance: Mapping[str, Any], *, merged: bool) -> str:
    """Markdown with YAML front matter.

    Args:
        recipe: of the run.
        plan: with its totals.
        summary: one sentence on the method.
        provenance: for the version, and recovery if there was any.
        merged: whether the checkpoint is an ordinary dense one.
    """
    totals = plan.totals
    loss = totals["predicted_loss"]
    forecast = "" if loss is None else f"| forecast of the KL divergence to the dense model, Σ ½J | {loss:.4f} nats/token |\n"
    if plan.caution is not None and loss is not None:
        forecast += f"| the forecast is not to be trusted | {plan.caution} |\n"
    recovery = ""
    for trained in recoveries(provenance):
        recovery += f"| then trained towards the dense model | {trained_words(trained)} |\n"
    calibration = recipe.calibration
    megabytes = (totals["dense_bytes"] if merged else totals["bytes"]) or 0
    return _CARD.format(
        base=recipe.source.model,
        trained=", then trained" if recovery else "",
        base_model=_base_model(recipe.source.model),
        method=plan.method,
        method_summary=summary,
        version=provenance["versions"].get("fasc", ""),
        rank_fraction="–" if totals["rank_fraction"] is None else f"{totals['rank_fraction']:.3f}",
        param_fraction=totals["param_fraction"],
        model_fraction=totals["model_fraction"],
        parameters=totals["parameters"],
        megabytes=megabytes / 1e6,
        dense_megabytes=(totals["dense_bytes"] or 0) / 1e6,
        outside=in_words(plan.outside or {}, plan.model.parameters),
        sequences=calibration.sequences,
        sequence_length=calibration.sequence_length,
        corpus=calibration.corpus,
        labels=calibration.labels,
        forecast=forecast,
        recovery=recovery,
        load=_LOAD_DENSE if merged or not plan.structural else _LOAD_FACTORED,
    )


def trained_words(one: Mapping[str, Any]) -> str:
    """What a recovery did, from its provenance."""
    kl = one["kl"]
    doubt = "" if one.get("held_out_is_unread") else ", of the text that calibrated: other text costs more"
    return (
        f"on {one['tokens'] - kl['held_out']:,} tokens of `{one['corpus']}`: KL divergence to the dense model {kl['before']:.4f} "
        f"before, {kl['after']:.4f} after, on {kl['held_out']:,} other tokens that were held out{doubt}"
    )


def _base_model(source: str) -> str:
    """The line for the hub, which knows its own names alone."""
    alias = EMBEDDED.get(source)
    known = alias.hub_id if alias is not None else source if _HUB_ID.fullmatch(source) and not Path(source).exists() else None
    return "" if known is None else f"base_model: {known}\n"


_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
