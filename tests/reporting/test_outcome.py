"""A compression ends with what was made, where, how large, how good by forecast, and what to do next."""

from math import exp
from pathlib import Path

import pytest

from fasc.reporting.outcome import outcome
from fasc.stages.plan import plan
from tests.conftest import tiny_model
from tests.pruning.pruned import statistics_of


@pytest.fixture
def made(tokens):
    model = tiny_model()
    return plan(model, statistics_of(model, tokens, "two-sided"), method="two-sided", param_fraction=0.6, damping=1e-2)


def test_a_compressed_checkpoint_is_described_in_sentences(made):
    text = "\n".join(outcome(made, Path("small"), "owner/model", merged=False))
    share = made.totals["bytes"] / made.totals["dense_bytes"]
    assert "`small` holds owner/model" in text
    assert f"{share:.0%} of the dense model's" in text
    assert f"KL divergence {made.predicted_loss:.3f} nats per token, perplexity × {exp(made.predicted_loss):.2f}" in text
    assert "where fasc is installed" in text
    for command in ("fasc evaluate small", "fasc bench small", "fasc recover small --out small-recovered"):
        assert f"`{command}`" in text


def test_a_merged_checkpoint_is_as_large_as_the_dense_one_and_needs_no_fasc(made):
    text = "\n".join(outcome(made, Path("small"), "owner/model", merged=True))
    assert "100% of the dense model's" in text
    assert "loads in any program" in text
    assert "recover" not in text


def test_without_a_forecast_none_is_printed():
    model = tiny_model()
    text = "\n".join(outcome(plan(model, method="svd", rank_fraction=0.5), Path("small"), "m", merged=False))
    assert "Forecast" not in text


def test_a_checkpoint_of_zeros_is_an_ordinary_one(tokens):
    model = tiny_model()
    zeros = plan(model, statistics_of(model, tokens, "magnitude"), method="magnitude", param_fraction=0.5)
    text = "\n".join(outcome(zeros, Path("small"), "m", merged=False))
    assert "loads in any program" in text
    assert "recover" not in text


@pytest.mark.parametrize("words,vllm,llama", [("channels", True, True), ("heads", False, True), ("values", False, False)])
def test_engines_are_named_that_can_hold_what_was_left_out(tokens, words, vllm, llama):
    model = tiny_model()
    cut = plan(
        model, statistics_of(model, tokens, "two-sided"), method="two-sided", max_kl=5.0, layouts=("dense", words), damping=1e-2
    )
    assert cut.edits
    text = "\n".join(outcome(cut, Path("small"), "m", merged=False, model_type="llama"))
    assert ("transformers and vLLM where" in text) == vllm
    assert ("`fasc export small --format gguf`" in text) == llama
