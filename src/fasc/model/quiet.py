"""No progress bars or advice of transformers between our own lines."""

import logging as python_logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only, and no bars, for the length of a ``with``."""
    for name in ("huggingface_hub", "accelerate"):  # retries, and that parts are offloaded, are told in our own words
        python_logging.getLogger(name).setLevel(python_logging.ERROR)
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")  # see --max-shard-size
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
