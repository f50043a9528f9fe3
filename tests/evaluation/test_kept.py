"""The same weights are not asked the same questions twice; anything that changes an answer is asked again."""

import copy

import pytest
import torch

from fasc.evaluation.evaluate import Record, evaluate
from fasc.evaluation.kept import KeptScores
from fasc.evaluation.registry import BENCHMARKS
from tests.conftest import tiny_model


@pytest.fixture
def asked(monkeypatch):
    """How often the benchmark was really run."""
    calls = []
    whole = BENCHMARKS["facts"].measure
    object.__setattr__(BENCHMARKS["facts"], "measure", lambda *given: calls.append(1) or whole(*given))
    yield calls
    object.__setattr__(BENCHMARKS["facts"], "measure", whole)


def run(model, tokenizer, options):
    record = Record()
    return evaluate(model, tokenizer, options, record=record), record.outcomes


def test_scores_and_outcomes_come_back_and_a_changed_weight_or_option_is_asked_again(
    tokenizer, config, asked, monkeypatch, tmp_path
):
    monkeypatch.setenv("FASC_CACHE", str(tmp_path))
    model = tiny_model()
    first = run(model, tokenizer, config("facts"))
    assert run(model, tokenizer, config("facts", batch_tokens=17)) == first
    assert len(asked) == 1
    run(model, tokenizer, config("facts", limit=5))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1
    run(changed, tokenizer, config("facts"))
    assert len(asked) == 3


def test_a_damaged_file_is_as_good_as_none(tokenizer, config, tmp_path):
    kept = KeptScores(tiny_model(), None, tmp_path)
    key = kept.key(BENCHMARKS["facts"], config("facts"), None)
    (tmp_path / f"{key}.json").write_text("{")
    assert kept.read(key) is None
