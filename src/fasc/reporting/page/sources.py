"""What a report is made of: the files of runs and of checkpoints, read and checked."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt

from fasc.errors import StorageError, UsageError
from fasc.evaluation.compared import Compared
from fasc.options import parse
from fasc.planning.one_width import asks_for_one_width
from fasc.planning.plan import Plan
from fasc.reporting.entries import DENSE, Entry, read_entries
from fasc.reporting.scores import require_scores_of, require_scores_of_itself
from fasc.serving.checkpoint import PLAN_FILE, PROVENANCE_FILE, RECIPE_FILE
from fasc.storage import expanded, read_json

_BESIDE = ("scores", "speed", "diagnosis", "validation")
"""What lies beside a checkpoint: ``small.scores.json``."""


@dataclass(frozen=True, slots=True)
class Model:
    """One row of the report."""

    name: str
    """As it is shown; no two models of a report share one."""

    run: str
    entry: Entry
    plan: Plan | None = None
    """``None`` for the dense model."""

    merged: bool = False
    """Whether it is stored as an ordinary dense model again."""

    dense_plan: Plan | None = None
    """Of any compressed model beside it, for what the dense one weighs."""

    folder: str = ""
    """Of a checkpoint, as it was named."""

    @property
    def place(self) -> str:
        """What to type for it in a shell."""
        return shlex.quote(self.folder or self.name)

    def beside(self, part: str) -> str:
        """The file beside it that holds a part, to type in a shell."""
        return shlex.quote(f"{self.folder or self.name}.{part}.json")

    @property
    def caution(self) -> str | None:
        """Why its forecast is not to be trusted, if it is not."""
        return None if self.plan is None or self.plan.predicted_loss is None else self.plan.caution

    @property
    def results(self) -> Entry:
        """What was measured of it, under the name that it has here."""
        return replace(self.entry, name=self.name)

    @property
    def is_dense(self) -> bool:
        """Whether nothing was done to it."""
        return self.plan is None

    @property
    def bytes(self) -> int | None:
        """Of the weights on disk."""
        if self.entry.rival is not None:
            return self.entry.rival.bytes
        plan = self.plan or self.dense_plan
        if plan is None:
            return None
        kept = self.plan is not None and not (self.merged and not asks_for_one_width(plan.options))
        return int(plan.totals["bytes" if kept else "dense_bytes"] or 0)

    @property
    def multiply_adds(self) -> float | None:
        """Of the layers that a plan may touch, for one token."""
        plan = self.plan or self.dense_plan
        if plan is None:
            return None
        dense = sum(layer.d_in * layer.d_out for layer in plan.layers)
        return dense if self.plan is None or self.merged else dense * float(plan.totals["multiply_add_fraction"] or 0)

    @property
    def dense_bytes(self) -> int | None:
        """Of the dense model's weights."""
        return self.as_dense().bytes

    def as_dense(self) -> "Model":
        """The model that it was made of, without its scores."""
        return replace(self, plan=None, dense_plan=self.plan or self.dense_plan, entry=Entry(DENSE, (), None))

    @property
    def series(self) -> str:
        """What it has in common with the same method at other budgets."""
        return self.entry.name.partition("@")[0]


@dataclass(frozen=True, slots=True)
class Source:
    """A run, a checkpoint, or a single result."""

    name: str
    models: tuple[Model, ...] = ()
    diagnosis: Mapping[str, Any] | None = None
    validation: Mapping[str, Any] | None = None
    comparison: Compared | None = None
    """Models item by item."""

    remarks: Sequence[str] = ()
    """What a measurement of speed had to say."""

    provenance: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = ""
    """TOML."""


_LARGEST = 1e30
"""That a plot can draw."""

Number = Annotated[FiniteFloat, Field(ge=-_LARGEST, le=_LARGEST)]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$")]
"""Text without line breaks or escapes."""


class _Score(BaseModel):
    benchmark: Line
    metric: Line
    value: Number
    low: Number | None
    high: Number | None
    n: Annotated[int, Field(ge=0, le=2**53)]
    protocol: str = ""


class _Speed(BaseModel):
    what: str
    unit: str
    dense: FiniteFloat
    compressed: FiniteFloat
    ratio: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class _Sample(BaseModel):
    prompt: str
    continuation: str


class _Energies(BaseModel):
    curve: list[FiniteFloat] = Field(min_length=2)
    directions: NonNegativeInt
    predicted_loss: FiniteFloat | None = None


class _Group(BaseModel):
    block: int | None
    kind: str
    rho: FiniteFloat | None
    rho_floor: FiniteFloat | None
    rho_debiased: FiniteFloat | None
    methods: dict[str, _Energies]


class _Expert(BaseModel):
    block: int | None
    expert: NonNegativeInt
    tokens: NonNegativeInt
    share: FiniteFloat
    rho: dict[str, FiniteFloat | None]
    predicted_loss: dict[str, FiniteFloat]


class _Case(BaseModel):
    method: str
    group: str
    half_j: FiniteFloat
    kl: FiniteFloat
    rank_fraction: FiniteFloat


_ROWS: Mapping[str, tuple[str, type[BaseModel]]] = {
    "scores": ("scores", _Score),
    "samples": ("samples", _Sample),
    "speed": ("comparisons", _Speed),
    "diagnosis": ("groups", _Group),
    "validation": ("rows", _Case),
}
"""By part: the key of its rows, and what each must hold."""


def checked(part: str, content: Any, where: str) -> dict[str, Any]:
    """The content of a file of ours, its rows seen to hold what the report reads.

    Raises:
        StorageError: it does not; names the row and the field.
    """
    key, row_type = _ROWS[part]
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, (list, tuple)):
        raise StorageError(f"{where} holds no {part} of fasc", "name a folder that `fasc run` or `fasc compress` wrote")
    seen = {key: _rows(rows, row_type, f"`{key}`", where)}
    if part == "diagnosis" and isinstance(content.get("experts"), (list, tuple)):
        seen["experts"] = _rows(content["experts"], _Expert, "`experts`", where)
    return {**content, **seen}


def _rows(rows: Sequence[Any], row_type: type[BaseModel], key: str, where: str) -> list[dict[str, Any]]:
    seen = []
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise StorageError(f"{where}, row {index} of {key}: no object", "write the file again")
        try:
            seen.append(row | parse(row_type, row, f"{where}, row {index} of {key}").model_dump())
        except UsageError as problem:
            raise StorageError(problem.message, "write the file again") from problem
    return seen


def read_source(folder: str | Path) -> Source:
    """Everything a run or a checkpoint left.

    A checkpoint's scores and the like lie beside it: ``small.scores.json`` for the folder ``small``. A diagnosis or validation
    beside a run's folder is taken, too.

    Raises:
        StorageError: it is neither, holds no scores, or a file is damaged; names the file.
        FascError: a plan is damaged or of another version.
    """
    path = expanded(folder)
    if not path.is_dir():
        raise StorageError(f"`{path}` is no folder", "name a folder that `fasc run` or `fasc compress` wrote")
    return _checkpoint(path) if (path / PLAN_FILE).is_file() else _run(path)


def dense_source(file: str | Path, beside: Sequence[Source]) -> Source:
    """Scores of the dense model that checkpoints were made from, as `fasc evaluate --json` wrote them.

    Args:
        file: of scores.
        beside: the checkpoints, whose plans say what the dense model weighs.

    Raises:
        StorageError: it holds no scores.
        UsageError: they are of another model than the checkpoints were made from.
    """
    path = expanded(file)
    if not path.is_file():
        raise StorageError(f"`{path}` is not there", "`fasc evaluate DENSE --json FILE` writes the dense model's scores")
    try:
        found = checked("scores", read_json(path), f"`{path}`")
    except StorageError as problem:
        raise StorageError(problem.message, "`fasc evaluate DENSE --json FILE` writes the dense model's scores") from problem
    for source in beside:
        if source.provenance.get("model"):
            statistics = source.provenance.get("statistics")
            known = statistics.get("model_fingerprint") if isinstance(statistics, Mapping) else None
            require_scores_of(found, f"`{path}`", f"`{source.name}`", model=str(source.provenance["model"]), fingerprint=known)
    plan = next((model.plan for source in beside for model in source.models if model.plan is not None), None)
    name = "dense"
    return Source(name, (Model(DENSE, name, Entry(DENSE, found["scores"], None), dense_plan=plan),))


def speed_source(checkpoint: str, found: Mapping[str, Any]) -> Source:
    """What `fasc bench` measured of a checkpoint, with its plan if it is one of ours."""
    folder = Path(checkpoint)
    plan = Plan.load(folder / PLAN_FILE) if (folder / PLAN_FILE).is_file() else None
    made = {**found["provenance"], "model": _facts(folder / PROVENANCE_FILE).get("model", checkpoint)}
    remarks = [
        f"The blocks hold {found['ideal']:.2f} × fewer parameters: the most that their saving can bring.",
        *found["remarks"],
    ]
    model = Model(folder.name, folder.name, Entry(folder.name, (), None, speeds=found["comparisons"]), plan)
    return Source(folder.name, (model,), remarks=remarks, provenance=made)


def _run(folder: Path) -> Source:
    entries, plans = [], {}
    for entry in read_entries(folder):
        place = folder / entry.name
        rows = {
            part: checked(part, {_ROWS[part][0]: found}, f"`{place / part}.json`")[_ROWS[part][0]]
            for part, found in (("scores", entry.scores), ("samples", entry.samples), ("speed", entry.speeds))
        }
        if entry.plan is not None:
            plans[entry.name] = Plan.from_dict(entry.plan, f"`{place / 'plan.json'}`")
        elif entry.name != DENSE and entry.rival is None:
            raise StorageError(f"`{place}` holds scores and no plan", "run `fasc run` again: it goes on there")
        plan = plans[entry.name].to_dict() if entry.name in plans else None
        entries.append(Entry(entry.name, rows["scores"], plan, rows["samples"], rows["speed"], entry.rival))
    any_plan = next(iter(plans.values()), None)
    name = folder.resolve().name
    models = tuple(
        Model(entry.name, name, entry, plans.get(entry.name), dense_plan=None if entry.rival else any_plan) for entry in entries
    )
    return Source(
        name,
        models,
        diagnosis=_beside(folder, "diagnosis") or _part(folder / "diagnosis.json", "diagnosis"),
        validation=_beside(folder, "validation"),
        provenance=_facts(folder / "provenance.json"),
        recipe=_text(folder / "recipe.toml"),
    )


def _checkpoint(folder: Path) -> Source:
    name, plan = folder.resolve().name, Plan.load(folder / PLAN_FILE)
    parts = {part: _beside(folder, part) or {} for part in _BESIDE}
    provenance = _facts(folder / PROVENANCE_FILE)
    require_scores_of_itself(parts["scores"], f"`{name}.scores.json`", str(folder))
    entry = Entry(
        name,
        scores=parts["scores"].get("scores", ()),
        plan=plan.to_dict(),
        speeds=parts["speed"].get("comparisons", ()),
    )
    return Source(
        name,
        (
            Model(
                name,
                name,
                entry,
                plan,
                merged=bool(provenance.get("merged")),
                folder=str(folder if folder.name else folder.resolve()),
            ),
        ),
        diagnosis=parts["diagnosis"] or None,
        validation=parts["validation"] or None,
        remarks=parts["speed"].get("remarks", ()),
        provenance=provenance,
        recipe=_text(folder / RECIPE_FILE),
    )


def _beside(folder: Path, part: str) -> dict[str, Any] | None:
    """What lies beside a folder: ``small.diagnosis.json`` for ``small``."""
    place = folder.resolve()
    return _part(place.with_name(f"{place.name}.{part}.json"), part)


def _part(file: Path, part: str) -> dict[str, Any] | None:
    return checked(part, read_json(file), f"`{file}`") if file.is_file() else None


def _facts(file: Path) -> dict[str, Any]:
    content = read_json(file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as problem:
        raise StorageError(f"cannot read `{file}`: {problem}", "check the file and its permissions") from problem
