"""Statistics → :class:`Diagnosis`."""
