"""Statistics as one safetensors file; what is read is checked against what it says it is, here and nowhere else."""

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, Field, FiniteFloat, PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fasc.errors import NonFiniteError, StatisticsError
from fasc.model.groups import InputGroup, Scope
from fasc.provenance import digest
from fasc.statistics.accumulators import Covariance
from fasc.statistics.extras import EXTRAS
from fasc.statistics.options import Labels
from fasc.statistics.unit import GradientMoment, GroupStatistics, Moment, Need, Side, smaller_side, units_of
from fasc.statistics.vocabulary import VOCABULARY, VocabularyMoments
from fasc.storage import new_file, storage_error

FORMAT = 2
"""Since 2 every group says how many tokens and sequences the text has."""

_TEXT = "text"
"""Key of the tokens; all other keys hold a slash."""

_ENDS = "vocabulary"
"""Before the names of the moments at the embedding and the head."""

_ROUNDING = 1e-5
"""How far a covariance may be from symmetric, or a variance below 0, relative to the largest entry."""

_ROWS = 1024
"""Rows of a matrix that are compared with its columns at a time."""

Groups = Mapping[str, GroupStatistics]
Shape = tuple[int | None, ...]


class _Part(BaseModel, frozen=True, strict=True, extra="forbid"):
    pass


class _Layer(_Part):
    name: Annotated[str, Field(min_length=1)]
    d_in: PositiveInt
    d_out: PositiveInt
    bias: bool


class _Group(_Part):
    layers: Annotated[list[_Layer], Field(min_length=1)]
    tokens: PositiveInt
    text_tokens: PositiveInt
    sequences: PositiveInt
    units: dict[str, Side]


class _Meta(BaseModel, frozen=True, extra="allow"):
    model_fingerprint: str
    token_digest: str
    labels: Labels
    needs: list[tuple[Moment, Scope]]
    calibration: dict[str, Any]
    nll: FiniteFloat | None = None


class _Header(_Part):
    groups: Annotated[list[_Group], Field(min_length=1)]
    meta: _Meta


Contents = tuple[Groups, dict[str, Any], Tensor | None, VocabularyMoments | None]
"""Groups, meta, text, and the moments at both ends of the model."""


def write_statistics(
    path: Path,
    groups: Groups,
    meta: Mapping[str, Any],
    text: Tensor | None,
    vocabulary: VocabularyMoments | None = None,
) -> None:
    """Write the file, whole or not at all.

    Raises:
        NonFiniteError: a moment holds NaN or infinity.
        StorageError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    layout = []
    for name, group in groups.items():
        tensors |= dict(_covariance_tensors(f"{name}/input", group.input))
        for unit, gradient in group.gradients.items():
            scope = _scope(name, unit)
            tensors |= dict(_covariance_tensors(f"{unit}/gradient/{scope}", gradient.covariance))
            if gradient.cross is not None:
                tensors[f"{unit}/cross/{scope}"] = gradient.cross
        tensors |= {f"{name}/extra/{key}": value for key, value in group.extras.items()}
        counts = {"tokens": group.tokens, "text_tokens": group.text_tokens, "sequences": group.sequences}
        layout.append({**group.group.to_dict(), **counts, "units": {unit: one.side for unit, one in group.gradients.items()}})
    tensors |= {} if vocabulary is None else {f"{_ENDS}/{key}": value for key, value in vocabulary.tensors().items()}
    _require_finite(tensors)
    if text is not None:
        tensors[_TEXT] = text
    header = {"format": str(FORMAT), "groups": json.dumps(layout), "meta": json.dumps(dict(meta))}
    with new_file(path) as scratch:
        try:
            save_file({key: value.contiguous() for key, value in tensors.items()}, scratch, metadata=header)
        except SafetensorError as problem:
            raise storage_error(problem, path) from problem


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for key, value in tensors.items():
        if not _is_finite(value):
            raise NonFiniteError(f"the moment `{key}`", "load the model as --dtype float32, or check the text")


def read_statistics(path: Path) -> Contents:
    """What a file holds, checked: names, shapes, counts, symmetry, no NaN or infinity.

    Raises:
        StatisticsError: missing, damaged, or of another format; one line that names what is wrong.
    """
    again = "run `fasc collect` again"
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
            if raw.get("format") != str(FORMAT):
                raise StatisticsError(f"`{path}` is not a statistics file of format {FORMAT}", again)
            return _Reader(file).read(raw)
    except FileNotFoundError as problem:
        raise StatisticsError(f"`{path}` does not exist", "run `fasc collect` first") from problem
    except (SafetensorError, OSError, _Damaged) as problem:
        raise StatisticsError(f"`{path}` is damaged: {problem}", again) from problem


class _Damaged(Exception):  # noqa: N818 - becomes a StatisticsError that names the file
    pass


class _Reader:
    """Reads one open file."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = set(file.keys())

    def read(self, raw: Mapping[str, str]) -> Contents:
        try:
            header = _Header(groups=json.loads(raw.get("groups", "null")), meta=json.loads(raw.get("meta", "null")))
        except ValidationError as problem:
            first = problem.errors()[0]
            raise _Damaged(f"header, {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from problem
        except (ValueError, RecursionError) as problem:
            raise _Damaged("its header is not JSON") from problem
        needs = frozenset(Need(*need) for need in header.meta.needs)
        read = [self._group(one, needs) for one in header.groups]
        groups = {one.group.name: one for one in read}
        if len(groups) < len(read):
            raise _Damaged("a group is in it twice")
        if len({(one.text_tokens, one.sequences) for one in read}) > 1:
            raise _Damaged("its groups are of texts of several lengths")
        text = self._text(header.meta.token_digest, read[0])
        vocabulary = self._vocabulary() if VOCABULARY in needs else None
        if self._left:
            raise _Damaged(f"tensor `{min(self._left)}` belongs to no group")
        meta: dict[str, Any] = json.loads(raw["meta"])
        return groups, meta, text, vocabulary

    def _group(self, raw: _Group, needs: frozenset[Need]) -> GroupStatistics:
        group = InputGroup.from_dict(raw.model_dump())
        if len({layer.d_in for layer in group.layers}) > 1:
            raise _Damaged(f"the layers of `{group.name}` read inputs of different sizes")
        units = {layers[0].name if len(layers) == 1 else group.name: layers for _, layers in units_of(group, needs)}
        if units.keys() != raw.units.keys():
            raise _Damaged(f"`{group.name}` has gradient moments of {list(raw.units)} instead of {list(units)}")
        gradients = {}
        for unit, layers in units.items():
            d_out = sum(layer.d_out for layer in layers)
            side, scope = smaller_side(group.d_in, d_out), _scope(group.name, unit)
            if raw.units[unit] != side:
                raise _Damaged(f"the gradients of `{unit}` are those of its {raw.units[unit]}s, not of its {side}s")
            size = group.d_in if side == "input" else d_out
            cross = self._tensor(f"{unit}/cross/{scope}", (group.d_in, size)) if Need("cross", scope) in needs else None
            gradients[unit] = GradientMoment(side, self._covariance(f"{unit}/gradient/{scope}", size), cross)
        return GroupStatistics(
            group,
            raw.tokens,
            raw.text_tokens,
            self._covariance(f"{group.name}/input", group.d_in),
            gradients,
            dict(self._extras(group, needs)),
            raw.sequences,
        )

    def _extras(self, group: InputGroup, needs: frozenset[Need]) -> Iterator[tuple[str, Tensor]]:
        wanted = {need.moment for need in needs}
        for name, shape in chain.from_iterable(make.shapes(group).items() for moment, make in EXTRAS.items() if moment in wanted):
            key = f"{group.name}/extra/{name}"
            if None not in shape or key in self._left:  # a layer without gradient has no sketches of sequences
                yield name, self._tensor(key, shape)

    def _vocabulary(self) -> VocabularyMoments:
        gradient = self._tensor(f"{_ENDS}/gradient", (None, None))
        if len(gradient) != gradient.shape[1]:
            raise _Damaged(f"`{_ENDS}/gradient` has shape {list(gradient.shape)}")
        frequency = self._tensor(f"{_ENDS}/frequency", (None,))
        read = self._tensor(f"{_ENDS}/input", tuple(gradient.shape))
        return VocabularyMoments(frequency, gradient, read, self._tensor(f"{_ENDS}/scale", tuple(frequency.shape)))

    def _covariance(self, key: str, size: int) -> Covariance:
        mean, matrix = self._tensor(f"{key}/mean", (size,)), self._tensor(f"{key}/covariance", (size, size))
        allowed = _ROUNDING * float(matrix.abs().max())
        if float(matrix.diagonal().min()) < -allowed:
            raise _Damaged(f"`{key}` has a negative variance")
        for start in range(0, size, _ROWS):
            rows = slice(start, start + _ROWS)
            if float((matrix[rows] - matrix[:, rows].mT).abs().max()) > allowed:
                raise _Damaged(f"`{key}` is not symmetric")
        return Covariance(mean, matrix)

    def _tensor(self, key: str, shape: Shape, dtype: torch.dtype = torch.float32) -> Tensor:
        if key not in self._left:
            raise _Damaged(f"it lacks `{key}`")
        self._left.remove(key)
        tensor: Tensor = self._file.get_tensor(key)
        sizes = [size for size, wanted in zip(tensor.shape, shape, strict=False) if wanted is None]
        if tuple(tensor.shape) != tuple(sizes.pop(0) if size is None and sizes else size for size in shape):
            raise _Damaged(f"`{key}` has shape {list(tensor.shape)} instead of {list(shape)}")
        if tensor.dtype != dtype:
            raise _Damaged(f"`{key}` holds {tensor.dtype} instead of {dtype}")
        if tensor.numel() == 0 or not _is_finite(tensor):
            raise _Damaged(f"`{key}` is empty or holds NaN or infinity")
        return tensor

    def _text(self, token_digest: str, group: GroupStatistics) -> Tensor | None:
        if _TEXT not in self._left:
            return None
        text = self._tensor(_TEXT, (group.sequences, None), torch.int64)
        if text.numel() != group.text_tokens or digest([text.numpy().tobytes()]) != token_digest:
            raise _Damaged("its text is not the one that it says it was measured on")
        return text


def _is_finite(tensor: Tensor) -> bool:
    """By its smallest and largest entry: NaN is both, and nothing of the tensor's size is made."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor))


def _scope(group: str, unit: str) -> Scope:
    return "group" if unit == group else "layer"


def _covariance_tensors(key: str, covariance: Covariance) -> Iterator[tuple[str, Tensor]]:
    yield f"{key}/mean", covariance.mean
    yield f"{key}/covariance", covariance.matrix
