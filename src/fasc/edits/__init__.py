"""What a plan is made of: one kind of edit, one file. Each knows its cost and forecast, checks and applies itself."""

from fasc.edits._registry import EDITS, Edit, Layers, edit_kind, layers_of, read_edit, require_layers

__all__ = ["EDITS", "Edit", "Layers", "edit_kind", "layers_of", "read_edit", "require_layers"]
