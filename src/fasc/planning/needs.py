"""Which allocation a budget gets, which units it may use, and the moments that this needs."""

from fasc.edits.narrow import Narrow
from fasc.errors import BudgetError
from fasc.layouts import layouts_named
from fasc.methods import Solver, get_method, solver
from fasc.model.groups import Scope
from fasc.planning.candidates import UNROUNDED, Cost, Rules
from fasc.planning.options import BY_RHO, BudgetConfig, MethodConfig
from fasc.planning.pruning import check_pruning
from fasc.planning.removable import EXPERTS, WORDS
from fasc.pruning import Pruning, find_method
from fasc.statistics.moments import Need
from fasc.statistics.vocabulary import VOCABULARY

_COSTS: dict[str, Cost] = {"rank_fraction": "rank", "max_bytes": "bytes", "flop_fraction": "multiply-adds"}


def solver_of(options: MethodConfig) -> Solver:
    """The method with its own options.

    Raises:
        UnknownNameError, UsageError: no such method, or no such option of it.
    """
    return solver(options.name, options.own)


def allocation_of(options: MethodConfig, budget: BudgetConfig) -> str:
    """The allocation that was asked for, or the default: see ``MethodConfig.allocation``.

    Raises:
        BudgetError: a global allocation is asked for energies that do not share a unit across layers.
    """
    method = get_method(options.name)
    if options.allocation == "fisher" and not method.is_loss:
        raise BudgetError(
            f"allocation `fisher` compares energies across layers, and those of `{method.name}` are in {method.energy_unit}, "
            "which differs from layer to layer",
            "use --allocation uniform, or a method whose energies are a loss in nats²: fasc, two-sided",
        )
    if options.allocation is not None:
        return options.allocation
    return "fisher" if method.is_loss and budget.kind != "rank_fraction" else "uniform"


def allocates_globally(options: MethodConfig, budget: BudgetConfig) -> bool:
    """Whether options of all layers are weighed against each other, which a rank fraction gives no reason to."""
    return allocation_of(options, budget) == "fisher" and budget.kind != "rank_fraction"


BY_DEFAULT = frozenset({Narrow.word})
"""What a plan may leave out where no layouts are named."""


def may_leave_out(options: MethodConfig, budget: BudgetConfig) -> frozenset[str]:
    """What the plan may leave out: a matter of the whole budget, which a rank fraction and a selection are not.

    Raises:
        BudgetError: heads, values or sublayers are asked for where nothing weighs them.
    """
    asked = BY_DEFAULT if options.layouts is None else frozenset(options.layouts) & frozenset(WORDS)
    others = [word for word in WORDS[1:] if options.layouts is not None and word in asked]
    weighed = allocates_globally(options, budget) and options.selection == "none"
    if others and (not weighed or options.propagate):
        raise BudgetError(
            f"`{others[0]}` is chosen by the forecast loss of the whole model, which this plan does not use",
            "leave --selection, --propagate and --allocation uniform out and give no rank fraction, or leave it out of --layouts",
        )
    if budget.equal_experts and EXPERTS in asked:
        raise BudgetError(
            "experts of one width are multiplied together, and a mean in the place of one has no width",
            f"leave --equal-experts out, or `{EXPERTS}` out of --layouts",
        )
    if not weighed:
        return frozenset()
    return asked if not options.propagate else asked & {Narrow.word}


def rules_of(options: MethodConfig, budget: BudgetConfig, *, bytes_per_parameter: int = 4) -> Rules:
    """What a plan may do.

    Raises:
        UnknownNameError: there is no such layout.
    """
    names = None if options.layouts is None else [name for name in options.layouts if name not in WORDS]
    return Rules(
        layouts=tuple(layouts_named(names)),
        rank_multiple=budget.rank_multiple,
        channel_multiple=budget.channel_multiple,
        equal_experts=budget.equal_experts,
        floor=budget.floor,
        overhead=budget.overhead if allocation_of(options, budget) == "fisher" else 0.0,
        cost="bytes" if options.bits else _COSTS.get(budget.kind, "parameters"),
        bytes_per_parameter=bytes_per_parameter,
        bits=options.bits or (),
        bits_group=options.bits_group,
        counts_multiply_adds=budget.flop_fraction is not None and budget.kind != "flop_fraction",
    )


def scopes_of(options: MethodConfig, budget: BudgetConfig) -> tuple[Scope, ...]:
    """Whether the plan may use projectors of whole groups, of single layers, or both; the method's own scope first."""
    method, rules = get_method(options.name), rules_of(options, budget)
    only = method.scopes[0] if len(method.scopes) == 1 else None
    allowed = tuple(scope for scope in method.scopes if rules.allows(scope, only))
    return allowed if allocates_globally(options, budget) else allowed[:1]


def needs_for(options: MethodConfig, budget: BudgetConfig | None) -> frozenset[Need]:
    """The moments that planning and compressing with a method under a budget need; without one, whatever any budget may need.

    Raises:
        UsageError, BudgetError: the method cannot do what is asked.
    """
    method = find_method(options.name)
    if isinstance(method, Pruning):
        if budget is not None:
            check_pruning(method, options, budget)
        return method.needs
    solver_of(options)
    scopes = method.scopes if budget is None else scopes_of(options, budget)
    needs = method.needs_in(scopes)
    if budget is None or budget.limits_loss:
        needs |= frozenset(Need("gradient", scope) for scope in scopes)
    check_bits(options, budget)
    if options.bits or (budget is None and method.is_loss):
        needs |= {OUTPUT_SCALE}
    if options.bits_vocabulary or (budget is None and method.is_loss):
        needs |= {VOCABULARY}
    leaves = options.selection != "none" and options.selection_else == NOTHING
    if leaves and budget is not None and budget.kind != "rank_fraction":
        raise BudgetError(
            f"--selection-else none leaves units as they are: {budget.kind} would be missed", "give --rank-fraction"
        )
    return needs | selection_needs(options)


OUTPUT_SCALE = Need("output_scale", "group")
"""What the forecast of rounding needs of the gradients."""


def check_bits(options: MethodConfig, budget: BudgetConfig | None) -> None:
    """Refuse bits where nothing could choose them.

    Raises:
        BudgetError: the budget does not see bits, or the plan is not made of forecasts.
    """
    if not options.bits and not options.bits_vocabulary:
        return
    if not options.bits:
        raise BudgetError("there are no bits from which embedding and head could have theirs", "give --bits 4,6,8 as well")
    wrong = [bits for bits in options.bits or () if bits > 8 and bits != UNROUNDED]
    if wrong:
        raise BudgetError(f"weights cannot be rounded to {wrong[0]} bits", f"give 1 to 8, or {UNROUNDED} for weights as they are")
    if budget is not None and not (budget.limits_loss or budget.kind == "max_bytes"):
        raise BudgetError(
            f"{budget.kind} counts weights, and {', '.join(map(str, options.bits or ()))} bits change their size alone",
            "give --max-bytes, --max-kl or --max-perplexity-increase",
        )
    if not get_method(options.name).is_loss or options.allocation == "uniform":
        raise BudgetError(
            f"bits are chosen by the forecast loss, which `{options.name}` under --allocation {options.allocation} does not use",
            "use fasc or two-sided, and leave --allocation out",
        )
    if options.selection != "none" or options.propagate:
        raise BudgetError("bits go with no selection of methods and no propagation", "leave --selection and --propagate out")


NOTHING = "none"
"""Instead of the other method of a selection: those units stay as they are."""


def selection_needs(options: MethodConfig) -> frozenset[Need]:
    """The moments that a selection of methods needs beside the method's own, per group.

    Raises:
        BudgetError: no other method where the selection does not go by ρ.
    """
    if options.selection == "none":
        return frozenset()
    by_rho = options.selection in BY_RHO
    if options.selection_else == NOTHING and not by_rho:
        raise BudgetError(f"the selection `{options.selection}` compares two methods and has one", f"use {' or '.join(BY_RHO)}")
    other = frozenset() if options.selection_else == NOTHING else get_method(options.selection_else).needs
    needs = other | {Need("gradient", "group")}
    return needs | {Need("cross", "group")} if by_rho else needs
