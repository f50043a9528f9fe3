"""Knowledge-aware compression of language models by Fisher-aligned subspaces.

``import fasc`` is fast: what is named here is imported when it is first used. It also teaches transformers to load our
checkpoints: after it, ``AutoModelForCausalLM.from_pretrained(folder)`` works on them.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

import lazy_loader
from wrapt import register_post_import_hook

from fasc.errors import FascError as FascError

__version__ = version("fasc")

__getattr__, _names, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "model.load": ["load_model"],
        "stages.calibrate": ["collect"],
        "stages.plan": ["plan"],
        "stages.compress": ["Compressed", "compress", "compress_checkpoint"],
        "stages.evaluate": ["evaluate"],
        "stages.diagnose": ["diagnose"],
        "runner": ["run"],
        "reporting.report": ["report"],
        "recipe": ["Recipe"],
        "statistics.moments": ["Statistics"],
        "planning.plan": ["Plan"],
        "evaluation.score": ["Score"],
        "diagnosis.diagnose": ["Diagnosis"],
        "methods": ["METHODS", "method"],
        "layouts": ["LAYOUTS", "layout"],
        "evaluation.registry": ["BENCHMARKS", "benchmark"],
    },
)
__all__ = sorted([*__all__, "FascError"])


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


def _register_quantizer(_module: Any) -> None:
    import_module("fasc.serving.quantizer")  # which registers itself, also where it is what imports transformers


register_post_import_hook(_register_quantizer, "transformers.quantizers.auto")
