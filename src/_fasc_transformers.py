"""Teaches transformers to load fasc's checkpoints, in any process, when and if it is imported.

`fasc.pth` imports this at the start of every Python process of the environment, so it imports nothing itself and takes
microseconds. It is no module of the package, because importing that costs more.
"""

import sys

WAITING = {
    "transformers.models.auto.configuration_auto": "fasc.serving.model_type",
    "transformers.quantizers.auto": "fasc.serving.quantizer",
}
"""Which of our modules is imported after which of transformers'; it registers itself."""


class Finder:
    """Lets the others find a module, and adds ours to the end of its execution."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        """The module's ordinary spec, with a loader that goes on to import ours."""
        if name not in WAITING:
            return None
        ours = WAITING.pop(name)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _import(ours)

        spec.loader.exec_module = exec_module
        return spec


def _import(ours):
    from importlib import import_module

    try:
        import_module(ours)
    except ImportError as problem:
        # transformers shall work on other models; on ours it says what is missing.
        from warnings import warn

        warn(f"fasc is installed and cannot be imported, so its checkpoints cannot be loaded: {problem}", stacklevel=2)


def install():
    """Watch for what was not imported yet, and register where it was; harmless when repeated."""
    for name in [name for name in WAITING if name in sys.modules]:
        _import(WAITING.pop(name))
    if not any(finder is Finder for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder)


install()
