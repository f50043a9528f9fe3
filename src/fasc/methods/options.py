"""The options that every method has."""

from typing import Annotated

from pydantic import Field

from fasc.options import Options


class MethodOptions(Options):
    """What a method can be told; a method that can be told more declares a subclass beside itself."""

    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    """Added to a covariance before it is inverted, as a multiple of its mean eigenvalue."""
