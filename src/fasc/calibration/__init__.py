"""Text and a model → :class:`Statistics`."""
