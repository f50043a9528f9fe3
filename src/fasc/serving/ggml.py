"""ggml's types of few bits: what they are, how large, and how they round a matrix.

The rounding is ggml's own, through the library that ``llama-cpp-python`` ships, so that a file holds what llama.cpp would have
written; the way back is the ``gguf`` package's.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from fasc.errors import UnknownNameError, UsageError

MENU: Sequence[GGMLQuantizationType] = (
    GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.IQ4_XS,
    GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K,
    GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q6_K,
    GGMLQuantizationType.Q8_0,
)
"""Types that a matrix may have, smallest first. Those of 2 and 3 bits with lookup tables take minutes to write: left out."""

_FILE_TYPES = {
    GGMLQuantizationType.Q2_K: LlamaFileType.MOSTLY_Q2_K,
    GGMLQuantizationType.Q3_K: LlamaFileType.MOSTLY_Q3_K_M,
    GGMLQuantizationType.IQ4_XS: LlamaFileType.MOSTLY_IQ4_XS,
    GGMLQuantizationType.IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
    GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q4_K_M,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q5_K: LlamaFileType.MOSTLY_Q5_K_M,
    GGMLQuantizationType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
}


def file_type(kind: GGMLQuantizationType) -> LlamaFileType:
    """What llama.cpp calls a file most of whose weights are of one type."""
    return _FILE_TYPES[kind]


def type_named(name: str) -> GGMLQuantizationType:
    """A type of :data:`MENU`, by ggml's name in any case.

    Raises:
        UnknownNameError: there is none.
    """
    known = {one.name: one for one in MENU}
    if name.upper() not in known:
        raise UnknownNameError("type", name, known)
    return known[name.upper()]


def row_bytes(kind: GGMLQuantizationType, width: int) -> int:
    """Bytes of one row; ``width`` is divisible by the type's block."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(width // block * size)


def fits(kind: GGMLQuantizationType, width: int) -> bool:
    """Whether rows of this width can have the type: ggml rounds whole blocks of 32 or 256 weights."""
    return bool(width % GGML_QUANT_SIZES[kind][0] == 0)


def rounded(weight: Tensor, kind: GGMLQuantizationType, importance: Tensor | None = None) -> NDArray[np.uint8]:
    """A matrix in a type of few bits, as llama.cpp stores it.

    Args:
        weight: [d_out, d_in].
        kind: of :data:`MENU`; its block divides d_in.
        importance: of each input, [d_in], not negative: the mean of its square. llama.cpp calls it an importance matrix.

    Returns:
        Bytes, [d_out, row bytes].

    Raises:
        UsageError: llama-cpp-python is not installed.
    """
    rows, width = weight.shape
    values = np.ascontiguousarray(weight.float().cpu().numpy())
    weights = None if importance is None else np.ascontiguousarray(importance.float().cpu().numpy())
    out = np.empty((rows, row_bytes(kind, width)), dtype=np.uint8)
    library = _library()
    written = library.ggml_quantize_chunk(
        int(kind), _address(values), out.ctypes.data_as(ctypes.c_void_p), 0, rows, width,
        None if weights is None else _address(weights),
    )  # fmt: skip
    assert written == out.nbytes, (kind, written, out.nbytes)  # noqa: S101 - ggml and the gguf package agree on sizes
    return out


def unrounded(data: NDArray[np.uint8], kind: GGMLQuantizationType) -> Tensor:
    """What llama.cpp computes with: [d_out, d_in] float32."""
    return from_numpy(np.ascontiguousarray(dequantize(data, kind), dtype=np.float32))


def _address(values: NDArray[np.float32]) -> "ctypes._Pointer[ctypes.c_float]":
    return values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


@cache
def _library() -> ctypes.CDLL:
    try:
        import llama_cpp  # noqa: PLC0415 - an extra
    except ImportError as problem:
        raise UsageError(
            "weights of few bits are rounded by llama.cpp's own code, and llama-cpp-python is not installed",
            "pip install 'fasc[gguf]'",
        ) from problem
    folder = Path(llama_cpp.__file__).parent / "lib"
    files = [one for one in sorted(folder.glob("*ggml-base*")) if one.suffix in (".so", ".dylib", ".dll")]
    if not files:
        raise UsageError(f"llama-cpp-python has no ggml library in {folder}", "pip install --force-reinstall llama-cpp-python")
    library = ctypes.CDLL(str(files[0]))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64,
        ctypes.POINTER(ctypes.c_float),
    ]  # fmt: skip
    return library
