"""Draw a few short sequences."""

from functools import cache

from fasc.text.corpus import TextRequest, load_corpus
from tests.conftest import tiny_model


def load(tokenizer, corpus, **options):
    settings = {"sequences": 4, "sequence_length": 16, "seed": 0, "role": "calibration"} | options
    return load_corpus(_model(), tokenizer, TextRequest(corpus=str(corpus), **settings))


@cache
def _model():
    return tiny_model()
