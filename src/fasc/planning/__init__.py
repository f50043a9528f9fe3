"""Budget, shapes and forecasts → :class:`~fasc.planning.plan.Plan`: an ordered list of edits."""
