"""Knowledge-aware compression of language models by Fisher-aligned subspaces.

``import fasc`` is fast: what is named here is imported when it is first used. It also teaches transformers to load our
checkpoints: after it, ``AutoModelForCausalLM.from_pretrained(folder)`` works on them.
"""

from importlib.metadata import version

import lazy_loader

import _fasc_transformers  # noqa: F401 - registers our model type and quantizer when transformers is imported
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
        "reporting.page.write": ["report"],
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
