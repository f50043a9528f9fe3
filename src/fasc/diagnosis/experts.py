"""The per-expert table: what each expert of a mixture hears, how it depends on it, and what it would cost to compress it."""

from collections.abc import Mapping, Sequence
from typing import Any

from fasc.model.layers import expert_of
from fasc.planning.experts import experts_in
from fasc.planning.plan import Plan


def expert_rows(rows: Sequence[Mapping[str, Any]], plan: Plan | None = None) -> list[dict[str, Any]]:
    """One row per expert, in the model's order, as plain JSON values; none for a model without experts.

    Args:
        rows: one per input group, of a diagnosis.
        plan: adds what it makes of each expert.

    Returns:
        ``name``, ``block``, ``expert``; ``tokens`` that reached it and their ``share`` of the text; ``rho`` and ``rho_debiased``
        by kind of group; ``predicted_loss`` by method, ½J of all its groups in nats per token of text; and from a plan ``kept``,
        ``dropped``, ``width``, ``channels``, ``ranks``, ``bits``, ``plan_loss`` and ``left`` in words.
    """
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        name = expert_of(row["layers"][0])
        if name is None:
            continue
        one = found.setdefault(
            name,
            {
                "name": name,
                "block": row["block"],
                "expert": row["expert"],
                "tokens": row["tokens"],
                "share": row["share"],
                "rho": {},
                "rho_debiased": {},
                "predicted_loss": {},
            },
        )
        for key in ("rho", "rho_debiased"):
            one[key][row["kind"]] = row[key]
        for method, loss in row["predicted_loss"].items():
            one["predicted_loss"][method] = one["predicted_loss"].get(method, 0.0) + loss
    planned = {} if plan is None else experts_in(plan)
    for name, one in found.items():
        if name in planned:
            left = planned[name]
            one |= {
                "kept": left.kept,
                "dropped": left.dropped,
                "width": 0 if left.dropped else left.width,
                "channels": left.channels,
                "ranks": {kind: rank for kind, (rank, _) in left.ranks.items()},
                "bits": left.bits,
                "plan_loss": left.loss,
                "left": left.words(),
            }
    return list(found.values())
