"""Dense: a unit that stays as it is has one rank, its own cost, and no edit."""

from fasc.layouts import LAYOUTS, FactoredLayout
from fasc.model.groups import Unit
from fasc.model.layers import Layer
from tests.layouts.units import unit_of


def test_one_layout_leaves_units_dense_and_makes_no_edit():
    assert [name for name, layout in LAYOUTS.items() if layout.leaves_dense] == ["dense"]
    assert not isinstance(LAYOUTS["dense"], FactoredLayout)


def test_it_costs_what_the_layers_cost():
    unit = Unit("a+b", (Layer("a", 12, 10, bias=True), Layer("b", 12, 6, bias=False)))
    dense = LAYOUTS["dense"]
    assert dense.parameters(unit, 10) == 12 * 16 + 10
    assert dense.multiply_adds(unit, 10) == 12 * 16
    assert dense.bytes(unit, 10, 2) == 2 * (12 * 16 + 10)
    assert dense.ranks(unit_of("one tall layer"), 2) == (7,)
