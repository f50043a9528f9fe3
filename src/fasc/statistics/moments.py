"""What calibration leaves behind: the moments of every input group, and where they came from.

The types of the whole folder are to be had from here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fasc.errors import StatisticsError
from fasc.model.groups import Scope, Unit
from fasc.options import parse
from fasc.provenance import digest, provenance
from fasc.statistics.accumulators import Covariance, weights_of
from fasc.statistics.file import read_statistics, write_statistics
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.shards import read_shards
from fasc.statistics.unit import (
    GradientMoment,
    GroupStatistics,
    Moment,
    Need,
    Side,
    UnitStatistics,
    as_float64,
    smaller_side,
)
from fasc.statistics.vocabulary import VocabularyMoments

__all__ = [
    "Covariance",
    "GradientMoment",
    "GroupStatistics",
    "Moment",
    "Need",
    "Scope",
    "Side",
    "Statistics",
    "UnitStatistics",
    "VocabularyMoments",
    "as_float64",
    "smaller_side",
    "text_identity",
    "without_gradient",
]


@dataclass(frozen=True)
class Statistics:
    """The moments of every group of a model on one text."""

    groups: Mapping[str, GroupStatistics]
    meta: Mapping[str, Any]
    """Model fingerprint, token digest, labels, needs: what these numbers belong to; and how they were made."""

    text: Tensor | None = None
    """The calibration text, int64 [sequences, length], where it had no padding: error propagation runs on it again."""

    vocabulary: VocabularyMoments | None = None
    """At the embedding and the head, where they were asked for."""

    @property
    def needs(self) -> frozenset[Need]:
        """The moments that were asked for."""
        return frozenset(Need(*need) for need in self.meta["needs"])

    @property
    def calibration(self) -> CalibrationConfig:
        """The text, and how it was measured.

        Raises:
            StatisticsError: they do not say.
        """
        if "calibration" not in self.meta:
            raise StatisticsError("the statistics do not say on what text they were measured", "measure with `fasc collect`")
        return parse(CalibrationConfig, self.meta["calibration"], "the statistics' calibration")

    def group(self, name: str) -> GroupStatistics:
        """The moments of a group.

        Raises:
            StatisticsError: there is no such group.
        """
        if name not in self.groups:
            raise StatisticsError(f"the statistics have no group `{name}`", "run `fasc collect` with the same layers")
        return self.groups[name]

    def unit(self, unit: Unit) -> UnitStatistics:
        """What a method is given for a unit.

        Raises:
            StatisticsError: there is no such group.
        """
        return self.group(unit.group).unit(unit.name)

    def require(self, needs: frozenset[Need]) -> None:
        """Raise ``StatisticsError`` unless every moment of ``needs`` is there."""
        absent = sorted(f"{need.moment} per {need.scope}" for need in needs - self.needs)
        if absent:
            more = " --diagnosis" if {need.moment for need in needs - self.needs} & {"cross", "sequences"} else ""
            raise StatisticsError(f"the statistics lack {', '.join(absent)}", f"run `fasc collect{more}` again with this method")

    def require_model(self, fingerprint: str) -> None:
        """Raise ``StatisticsError`` if these statistics were measured on another model."""
        if self.meta["model_fingerprint"] != fingerprint:
            raise StatisticsError(
                f"the statistics were measured on another model ({self.meta['model_fingerprint'][:12]}…, "
                f"this one is {fingerprint[:12]}…)",
                "run `fasc collect` on this model",
            )

    def present_in(self, model: nn.Module) -> "Statistics":
        """The same without groups whose layers the model does not have: experts, outside of ``expert_layers``."""
        names = {name for name, _ in model.named_modules()}
        groups = {name: one for name, one in self.groups.items() if all(layer.name in names for layer in one.group.layers)}
        return replace(self, groups=groups)

    def merge(self, other: "Statistics") -> "Statistics":
        """The moments on both texts together, as one pass over both would give them.

        Means over tokens are weighted by the tokens of each part, means over sequences by its sequences, in float64. Moments with
        labels sampled from the model agree with those of one pass in expectation only: each part has drawn its own labels.

        Args:
            other: the same moments of the same groups of the same model, on other text.

        Raises:
            StatisticsError: another model, other groups, needs or labels, or a text that is in both.
        """
        self._require_mergeable(other)
        groups = {}
        for name in dict.fromkeys([*self._group_names, *self.groups, *other.groups]):
            pair = [(part.groups[name], rest) for part, rest in ((self, other), (other, self)) if name in part.groups]
            if len(pair) == 2:
                groups[name] = self.groups[name].merge(other.groups[name])
            elif pair:
                present, absent = pair[0]
                some = next(iter(absent.groups.values()))
                groups[name] = present.lengthened(some.text_tokens, some.sequences)
        joinable = self.text is not None and other.text is not None and self.text.shape[1] == other.text.shape[1]
        text = torch.cat([self.text, other.text]) if joinable else None  # type: ignore[list-item]
        return Statistics(groups, _merged_meta(self.meta, other.meta, groups, text), text, self._merged_vocabulary(other))

    def _merged_vocabulary(self, other: "Statistics") -> VocabularyMoments | None:
        if self.vocabulary is None or other.vocabulary is None:
            return None
        counts = (next(iter(part.groups.values())).text_tokens for part in (self, other))
        return self.vocabulary.merge(other.vocabulary, weights_of(*counts))

    @property
    def _group_names(self) -> list[str]:
        """Every group of the model, those without a token as well, in the model's order."""
        return list(self.meta.get("groups", self.groups))

    def _require_mergeable(self, other: "Statistics") -> None:
        other.require_model(self.meta["model_fingerprint"])
        both = self.groups.keys() & other.groups.keys()
        if self._group_names != other._group_names or any(self.groups[name].group != other.groups[name].group for name in both):
            raise StatisticsError(
                "the statistics to be merged are of other layers", "measure both with the same --include and --exclude"
            )
        if self.needs != other.needs or self.meta.get("labels") != other.meta.get("labels"):
            raise StatisticsError(
                "the statistics to be merged hold other moments", "measure both for the same methods and --labels"
            )
        twice = {part["token_digest"] for part in _parts(self.meta)} & {part["token_digest"] for part in _parts(other.meta)}
        if twice:
            raise StatisticsError(
                f"the statistics to be merged share a text (token digest {min(twice)[:12]}…)",
                "merge statistics of different texts",
            )

    def save(self, path: str | Path) -> Path:
        """Write a ``.safetensors`` file.

        Raises:
            StatisticsError: there are none: only the first of several processes has them.
            NonFiniteError: a moment holds NaN or infinity.
            StorageError: it cannot be written.
        """
        if not self.groups:
            raise StatisticsError(
                "there are no moments to be saved", "of several processes only the first has them: save them there"
            )
        path = Path(path).expanduser()
        write_statistics(path, self.groups, self.meta, self.text, self.vocabulary)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what :meth:`save` or ``fasc collect --max-memory`` wrote, and check it. Tensors stay on disk until they are used.

        Raises:
            StatisticsError: missing, damaged, or of another format; of a folder, a shard is missing or of another run.
        """
        path = Path(path).expanduser()
        return cls(*(read_shards(path) if path.is_dir() else read_statistics(path)))


def text_identity(tokens: Tensor) -> str:
    """SHA-256 of tokens, int64 [sequences, length]."""
    return digest([tokens.cpu().contiguous().numpy().tobytes()])


def without_gradient(groups: Iterable[GroupStatistics]) -> list[str]:
    """Layers that the loss does not depend on, by these moments: every gradient of theirs was 0."""
    layers = []
    for one in groups:
        members = {one.group.name: one.group.layers, **{layer.name: (layer,) for layer in one.group.layers}}
        for unit, moment in one.gradients.items():
            if not bool(moment.covariance.matrix.diagonal().any() or moment.covariance.mean.any()):
                layers += [layer.name for layer in members[unit]]
    return list(dict.fromkeys(layers))


_SHARES = ("processes", "tokens_by_process")


def _parts(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The texts that the moments were measured on."""
    own = {key: meta[key] for key in ("token_digest", "text_digest", "read", "calibration", *_SHARES) if key in meta}
    return list(meta.get("parts", [own]))


def _merged_meta(
    one: Mapping[str, Any], other: Mapping[str, Any], groups: Mapping[str, GroupStatistics], text: Tensor | None
) -> dict[str, Any]:
    """Where merged moments came from: what both parts say alike, and each part."""
    parts = [*_parts(one), *_parts(other)]
    meta = {key: value for key, value in one.items() if key in other and other[key] == value and key not in _SHARES}
    if "calibration" in one:
        corpora = dict.fromkeys(str(part.get("calibration", {}).get("corpus", "")) for part in parts)
        sequences = next(iter(groups.values())).sequences
        meta["calibration"] = {**one["calibration"], "corpus": ",".join(filter(None, corpora)), "sequences": sequences}
    scored = one.get("scored_tokens", 0), other.get("scored_tokens", 0)
    if all(scored):
        first, second = weights_of(*scored)
        meta |= {"nll": first * one["nll"] + second * other["nll"], "scored_tokens": sum(scored)}
    apart = digest(sorted(part["token_digest"].encode() for part in parts))
    return meta | {
        "token_digest": apart if text is None else text_identity(text),
        "parts": parts,
        "without_gradient": without_gradient(groups.values()),
        "provenance": provenance(),
    }
