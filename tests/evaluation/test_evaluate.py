"""Benchmarks run in order, are refused before anything is done, and never hide a NaN."""

import pytest
import torch

from fasc.errors import NonFiniteError, UnknownNameError, UsageError
from fasc.evaluation.evaluate import Record, evaluate
from fasc.evaluation.text import evaluation_texts
from tests.conftest import tiny_model


@pytest.mark.parametrize("benchmark", ["perplexity", "kl", "facts"])
def test_a_batch_that_is_not_finite_is_an_error_and_not_a_better_score(tokenizer, config, benchmark):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("q")["input_ids"][0]] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"logits of .*{benchmark}"):
        evaluate(model, tokenizer, config(benchmark), dense=tiny_model())


def test_unknown_benchmarks_stop_everything_before_it_starts(tokenizer, config):
    with pytest.raises(UnknownNameError) as caught:
        evaluate(None, tokenizer, config("facts", "perplexty"))
    assert "perplexity" in caught.value.hint


def test_a_benchmark_that_compares_is_refused_without_the_dense_model(tokenizer, config):
    with pytest.raises(UsageError, match="dense model"):
        evaluate(None, tokenizer, config("perplexity", "kl"))


def test_evaluating_on_the_calibration_text_warns(tokenizer, config, capsys):
    digest = evaluation_texts(tiny_model(), tokenizer, config("perplexity"))[0].text_digest
    evaluate(tiny_model(), tokenizer, config("perplexity"), record=Record([digest], keep=False))
    assert "calibrated on" in capsys.readouterr().err


def test_both_models_are_scored_without_dropout_and_left_in_their_modes(tokenizer, config):
    model, dense = tiny_model("gpt2").train(), tiny_model("gpt2", seed=1).train()
    dense.transformer.h[0].eval()
    before = [[module.training for module in one.modules()] for one in (model, dense)]
    scores = evaluate(model, tokenizer, config("kl", "perplexity", "facts", limit=2), dense=dense)
    assert [[module.training for module in one.modules()] for one in (model, dense)] == before
    assert scores == evaluate(model.eval(), tokenizer, config("kl", "perplexity", "facts", limit=2), dense=dense.eval())


def test_two_benchmarks_of_one_text_share_a_pass(tokenizer, config):
    model, dense, calls = tiny_model(), tiny_model(seed=1), []
    for one in (model, dense):
        one.register_forward_hook(lambda module, *_: calls.append(module))
    evaluate(model, tokenizer, config("perplexity", "kl", limit=4), dense=dense)
    assert calls == [model, dense]


def test_several_texts_have_their_names_and_the_first_score_is_the_headline(tokenizer, config, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    options = config("kl", "facts").model_copy(update={"corpus": f"{text_file},{other}"})
    scores = evaluate(tiny_model(), tokenizer, options, dense=tiny_model(seed=1))
    names = list(dict.fromkeys(score.benchmark for score in scores))
    assert names == [f"kl@{text_file}", f"kl@{other}", "facts"]
    for name, metric in zip(names, ("kl", "kl", "accuracy"), strict=True):
        assert next(score for score in scores if score.benchmark == name).metric == metric
