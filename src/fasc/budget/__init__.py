"""Shapes and energies → :class:`RankPlan`."""
