"""What the tests of evaluation share."""

import pytest

from fasc.evaluation.options import EvaluationConfig


@pytest.fixture
def config(text_file):
    """The configuration of some benchmarks on a small text."""

    def make(*benchmarks, **options):
        return EvaluationConfig(
            benchmarks=benchmarks, corpus=str(text_file), context=16, **({"batch_tokens": 64, "limit": 12} | options)
        )

    return make
