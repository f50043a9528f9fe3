"""No progress bars or advice of transformers between our own lines."""

import logging as python_logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Errors only, and no bars, for the length of a ``with``."""
    hub = python_logging.getLogger("huggingface_hub")  # its retries are told in our own words
    hub.setLevel(python_logging.ERROR)
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
