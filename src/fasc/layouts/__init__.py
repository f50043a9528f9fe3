"""How a unit's weight is stored: one layout, one file. A new file with a ``@layout`` class is a new layout."""

from fasc.layouts._registry import LAYOUTS, Encoded, FactoredLayout, Layout, layout, layouts_named
from fasc.layouts._replacement import Replacement

__all__ = ["LAYOUTS", "Encoded", "FactoredLayout", "Layout", "Replacement", "layout", "layouts_named"]
