"""What llama.cpp's graphs can hold: one entry for each architecture that fasc exports."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from fasc.errors import UsageError

_ATTENTION_INPUTS = frozenset({"q_proj", "k_proj", "v_proj"})
_EVERY = _ATTENTION_INPUTS | {"o_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass(frozen=True, slots=True)
class Graph:
    """A graph of llama.cpp, for models whose blocks all have one MLP width."""

    name: str
    biases: frozenset[str]
    """Layers that may have a bias."""

    narrower: "Graph | None" = None
    """The graph for a width per block, or for biases that this one lacks."""

    interleaved: bool = False
    """Whether rotary pairs are neighbours; transformers has them half a head apart."""

    norm_shift: float = 0.0
    """Added to the weights of norms, which transformers stores without it."""

    activations: frozenset[str] = frozenset({"silu"})


DECI = Graph("deci", _EVERY, interleaved=True)
"""A width and numbers of heads for each block, biases everywhere: Nemotron's."""

_GEMMA = {"norm_shift": 1.0, "activations": frozenset({"gelu_pytorch_tanh", "gelu"})}
GRAPHS: Mapping[str, Graph] = {
    "llama": Graph("llama", _EVERY, narrower=DECI, interleaved=True),
    "mistral": Graph("llama", _EVERY, narrower=DECI, interleaved=True),
    "qwen2": Graph("qwen2", _ATTENTION_INPUTS, narrower=DECI),
    "qwen3": Graph("qwen3", _ATTENTION_INPUTS),
    "gemma": Graph("gemma", _ATTENTION_INPUTS, **_GEMMA),  # type: ignore[arg-type]
    "gemma2": Graph("gemma2", _ATTENTION_INPUTS, **_GEMMA),  # type: ignore[arg-type]
    "gemma3_text": Graph("gemma3", _ATTENTION_INPUTS, **_GEMMA),  # type: ignore[arg-type]
}
"""By transformers' ``model_type``."""


def graph_of(model_type: str) -> Graph:
    """The graph of an architecture.

    Raises:
        UsageError: there is none that fasc knows.
    """
    if model_type not in GRAPHS:
        raise UsageError(f"fasc writes no GGUF of `{model_type}` models", f"it does of {', '.join(GRAPHS)}")
    return GRAPHS[model_type]


def graph_for(model_type: str, shapes: Sequence[Hashable], biases: Mapping[str, str]) -> Graph:
    """The graph that holds a model with blocks of these shapes and with these biases.

    Args:
        model_type: transformers'.
        shapes: of each block: its heads and the width of its MLP.
        biases: leaf name ↦ qualified name of a layer that has one.

    Raises:
        UsageError: none does; names the option that makes a plan which fits.
    """
    graph = graph_of(model_type)
    lacking = [name for leaf, name in biases.items() if leaf not in graph.biases]
    if len(set(shapes)) == 1 and not lacking:
        return graph
    if graph.narrower is not None:
        return graph.narrower
    what = f"a bias of `{lacking[0]}`" if lacking else f"{len(set(shapes))} different shapes of blocks"
    raise UsageError(
        f"llama.cpp's graph of `{model_type}` cannot hold {what}", "compress with `--for plain`: one width, no biases"
    )
