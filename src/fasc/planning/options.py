"""How much is kept, by which method, and what a plan may do to get there."""

from math import isfinite, log1p
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from fasc.options import Options, bytes_of

AllocationName = Literal["uniform", "fisher"]
SelectionName = Literal["none", "rho", "low-rho", "predicted", "kl"]

BY_RHO = ("rho", "low-rho")
"""Selections that go by ρ alone."""


class MethodConfig(Options, extra="allow"):
    """Which method, how its ranks are allocated and its layers stored; and the options that the method itself declares."""

    model_config = ConfigDict(extra="allow")

    name: str = "fasc"
    """A registered method. Subspaces: `fasc`, `two-sided`, `whitened`, `svd`, `fasc-eq6`, `grad-weighted`, `fisher-diag`,
    `fwsvd`, `asvd`, `weight-svd`. Pruning, without a rank: `magnitude` and `wanda` write zeros, `llm-pruner` removes heads and
    channels."""

    allocation: AllocationName | None = None
    """`uniform`: the same share of every layer. `fisher`: the least forecast loss over all layers and layouts. Left out: `fisher`
    where the method's energies are a loss in nats and the budget is no rank fraction, `uniform` elsewhere."""

    layouts: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """How layers may be stored; the cheapest allowed one is taken at each rank. Left out: all but `merged`, and `channels`.
    `factors` allows separate layers and `shared` one projector per group, where the method leaves that open; `pivoted` keeps rows
    of the product as they are and `pivoted-columns` columns; `merged` stores a rank that saves nothing as one dense matrix. Under
    `fisher` parts may be left out first: `channels` of MLPs, `heads` of attentions, features of their `values`, whole sublayers
    (`skip`) and whole `experts`, in whose place their mean stands."""

    bits: Annotated[tuple[Annotated[int, Field(ge=1, le=16)], ...], Field(min_length=1)] | None = None
    """Numbers of bits, 1 to 8, from which every unit's weights may have theirs, such as `3,4,5,6,8`; 16 among them leaves weights
    as they are. Chosen together with the ranks, under a budget of bytes or of loss. Left out: nothing is rounded."""

    bits_group: PositiveInt = 64
    """Neighbouring inputs that share one scale, where weights are rounded."""

    bits_vocabulary: bool = False
    """Let embedding and head have their bits chosen as well, from the same numbers. Needs `--bits`."""

    propagate: bool = False
    """Compress block by block, each from the inputs it will really get, against the dense model's outputs."""

    selection: SelectionName = "none"
    """Which method each unit gets: `none`: this one everywhere. `rho`: this one where ρ is above the threshold, else the other
    (the paper's). `low-rho`: this one where ρ is not above it. `predicted`: the one with the lower forecast loss. `kl`: the one
    with the lower measured KL divergence on held-out text, compressing one unit at a time."""

    selection_threshold: Annotated[float, Field(ge=0)] = 0.3
    """Of ρ, for the selections `rho` and `low-rho`."""

    selection_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Instead of a threshold: so many of all units get this method, those with the highest ρ, or under `low-rho` the lowest."""

    selection_else: str = "svd"
    """The other method of a selection; `none` leaves these units as they are."""

    label: str | None = None
    """Name of the row in a run's tables, where the method's own would not tell two rows apart."""

    @model_validator(mode="after")
    def _nothing_unused(self) -> Self:
        of = {"selection_else": self.selection == "none", "selection_threshold": self.selection not in BY_RHO}
        of |= {"selection_share": self.selection not in BY_RHO}
        for name, unused in of.items():
            if unused and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} means nothing beside selection {self.selection}")
        if (
            self.selection_share is not None
            and self.selection_threshold != type(self).model_fields["selection_threshold"].default
        ):
            raise ValueError("selection_share and selection_threshold are both given: give one")
        return self

    @property
    def own(self) -> dict[str, Any]:
        """The options that the method declares itself, as given."""
        return dict(self.model_extra or {})

    def but(self, **changes: Any) -> Self:
        """The same with other values."""
        return type(self).model_validate({**self.model_dump(exclude_unset=True), **changes})


class BudgetConfig(Options):
    """How much is kept: one of the fields down to `flop_fraction`."""

    rank_fraction: float | None = None
    """Rank ÷ min(d_in, d_out) of each layer; for a group of several layers with one projector, rank ÷ d_in. 0.5 if no budget is
    given."""

    param_fraction: float | None = None
    """Parameters of the compressed layers ÷ their dense parameters."""

    model_fraction: float | None = None
    """Parameters of the whole model ÷ those of the dense model."""

    max_bytes: Annotated[int | str, Field(union_mode="left_to_right")] | None = None
    """Bytes of the weights file, at most: a number, or one with kB, MB, GB, KiB, MiB, GiB."""

    max_perplexity_increase: Annotated[float | str, Field(union_mode="left_to_right")] | None = None
    """The smallest model whose forecast perplexity is at most so much above the dense one's: `5%` or 0.05."""

    max_kl: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The smallest model whose forecast KL divergence to the dense one is at most so many nats per token."""

    flop_fraction: float | None = None
    """Multiply-adds of the compressed layers for one token ÷ those of the dense ones. May be given beside a budget of parameters
    or bytes; both are then kept."""

    rank_multiple: PositiveInt = 8
    """Ranks are multiples of this, in layers at least sixteen times as wide."""

    channel_multiple: PositiveInt | None = None
    """MLP widths are multiples of this. Left out: the rank multiple, coarser where an MLP would have more than 24 widths to
    choose from. Some processors multiply by multiples of 256 a third faster."""

    equal_experts: bool = False
    """Let all experts of a block keep as many channels as each other, which kernels that multiply them together want."""

    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of its dense parameters that each layer keeps at least."""

    overhead: NonNegativeInt = 32768
    """Penalty, in parameters, per matrix product that factoring a layer adds. Higher means fewer products, a faster model of the
    same size, and more loss. 0 counts parameters alone."""

    @model_validator(mode="before")
    @classmethod
    def _one_budget(cls, given: Any) -> Any:
        if isinstance(given, dict):
            asked = [name for name in BUDGETS if given.get(name) is not None]
            if set(asked) in [{name, "flop_fraction"} for name in _OF_SIZE]:
                asked = asked[:1]
            if len(asked) > 1:
                raise ValueError(f"{' and '.join(asked)} are both budgets: give one")
            if not asked:
                return {**given, "rank_fraction": 0.5}
        return given

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        for name in ("rank_fraction", "param_fraction", "model_fraction", "flop_fraction"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value:g}, outside (0, 1]")
        if self.max_bytes is not None and not self.bytes_limit > 0:
            raise ValueError(f"max_bytes is {self.max_bytes}, not above 0")
        if self.max_perplexity_increase is not None and not self.loss_limit > 0:
            raise ValueError(f"max_perplexity_increase is {self.max_perplexity_increase}, not above 0")
        return self

    @property
    def kind(self) -> str:
        """Name of the field that was given."""
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def limits_loss(self) -> bool:
        """Whether the budget says how much may be lost, and not how much is kept."""
        return self.kind in ("max_kl", "max_perplexity_increase")

    @property
    def label(self) -> str:
        """Short name, for folders and rows: `0.5`, `params0.8`, `model0.8`, `400MB`, `ppl+5%`, `kl0.05`.

        What else is not as usual follows: `params0.8-floor0.25`.
        """
        short = {
            "rank_fraction": "",
            "param_fraction": "params",
            "model_fraction": "model",
            "max_bytes": "",
            "flop_fraction": "flops",
        }
        value = getattr(self, self.kind)
        number = f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
        fields = {"floor": "floor", "multiple": "rank_multiple", "channels": "channel_multiple", "overhead": "overhead"}
        fields |= {"equalexperts": "equal_experts"}
        unusual = {name: getattr(self, field) for name, field in fields.items()}
        usual = {name: type(self).model_fields[field].default for name, field in fields.items()}
        rest = "".join(f"-{name}{value:g}" for name, value in unusual.items() if value != usual[name])
        rest = f"-flops{self.flop_fraction:g}{rest}" if self.kind != "flop_fraction" and self.flop_fraction is not None else rest
        return {**short, "max_perplexity_increase": "ppl+", "max_kl": "kl"}[self.kind] + number + rest

    @property
    def bytes_limit(self) -> int:
        """``max_bytes`` as a number."""
        try:
            return bytes_of(self.max_bytes)
        except ValueError as problem:
            raise ValueError(f"max_bytes: {problem}") from None

    @property
    def loss_limit(self) -> float:
        """The forecast loss that is allowed, in nats per token."""
        if self.max_kl is not None:
            return self.max_kl
        text = str(self.max_perplexity_increase).strip()
        percent = text.endswith("%")
        try:
            number = float(text.rstrip("%")) / (100 if percent else 1)
        except ValueError:
            raise ValueError(f"max_perplexity_increase: `{text}` is not a number") from None
        if not isfinite(number):
            raise ValueError(f"max_perplexity_increase: `{text}` is not finite")
        return log1p(number)


BUDGETS = ("rank_fraction", "param_fraction", "model_fraction", "max_bytes", "max_perplexity_increase", "max_kl", "flop_fraction")
"""The fields of which one is given, or one of size and `flop_fraction`."""

_OF_SIZE = ("param_fraction", "model_fraction", "max_bytes")
