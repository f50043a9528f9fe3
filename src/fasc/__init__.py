"""Knowledge-aware low-rank compression of language models by Fisher-aligned subspaces.

``import fasc`` is fast: the stages load torch and transformers when they are used. It also teaches transformers to load our
checkpoints: after it, ``AutoModelForCausalLM.from_pretrained(folder)`` works on them.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

from fasc.errors import FascError

if TYPE_CHECKING:
    from fasc.planning.plan import RankPlan
    from fasc.statistics.collect import collect
    from fasc.text.corpus import load_corpus
    from fasc.statistics.moments import Statistics
    from fasc.compression.compress import compress
    from fasc.recipe import Recipe
    from fasc.diagnosis.diagnose import Diagnosis, diagnose
    from fasc.evaluation.evaluate import evaluate
    from fasc.evaluation.score import Score
    from fasc.methods import METHODS, method
    from fasc.model.load import load_model
    from fasc.pipeline import plan, run
    from fasc.reporting.report import report

__version__ = version("fasc")

_WHERE = {
    "Diagnosis": "fasc.diagnosis.diagnose",
    "METHODS": "fasc.methods",
    "RankPlan": "fasc.planning.plan",
    "Recipe": "fasc.config",
    "Score": "fasc.evaluation.score",
    "Statistics": "fasc.statistics.moments",
    "collect": "fasc.statistics.collect",
    "compress": "fasc.compression.compress",
    "diagnose": "fasc.diagnosis.diagnose",
    "evaluate": "fasc.evaluation.evaluate",
    "load_corpus": "fasc.text.corpus",
    "load_model": "fasc.model.load",
    "method": "fasc.methods",
    "plan": "fasc.pipeline",
    "report": "fasc.reporting.report",
    "run": "fasc.pipeline",
}

__all__ = [
    "METHODS",
    "Diagnosis",
    "FascError",
    "RankPlan",
    "Recipe",
    "Score",
    "Statistics",
    "collect",
    "compress",
    "diagnose",
    "evaluate",
    "load_corpus",
    "load_model",
    "method",
    "plan",
    "report",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'fasc' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def _register_quantizer(_module: Any) -> None:
    import_module("fasc.serving.quantizer")  # which registers itself, also where it is what imports transformers


register_post_import_hook(_register_quantizer, "transformers.quantizers.auto")
