"""Sets of moments, as methods ask for them."""

from fasc.statistics.moments import Need

INPUTS = frozenset({Need("input", "group")})
GRADIENTS = INPUTS | {Need("gradient", "group")}
COVARIANCES = INPUTS | {Need(moment, scope) for moment in ("gradient", "cross") for scope in ("group", "layer")}
EXTRAS = frozenset(Need(moment, "group") for moment in ("magnitude", "product", "rows", "taylor", "sequences"))
EVERYTHING = COVARIANCES | EXTRAS
