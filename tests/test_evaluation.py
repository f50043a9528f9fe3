"""Scores are right, carry intervals, and never hide a NaN."""

import gzip
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

from fasc.evaluation.options import EvaluationConfig
from fasc.planning.options import BudgetConfig
from fasc.errors import CorpusError, NonFiniteError, UnknownNameError, UsageError
from fasc.evaluation import BENCHMARKS, Subject, _cloze
from fasc.evaluation.cloze import ClozeItem, best_candidates, candidate_tokens
from fasc.evaluation.speed import Comparison, peak_memory, remarks
from fasc.evaluation.evaluate import evaluate
from fasc.evaluation.benchmarks.facts import read_facts
from fasc.evaluation.benchmarks.lama import read_trex
from fasc.evaluation.score import mean_interval, proportion_interval
from tests.conftest import tiny_model


def config(text_file, *benchmarks, **options):
    return EvaluationConfig(
        benchmarks=benchmarks, corpus=str(text_file), context=16, **({"batch_tokens": 64, "limit": 12} | options)
    )


def nll_by_hand(model, tokens):
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.double()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()


def test_perplexity_is_exp_of_the_mean_loss_whatever_the_batch(tokenizer, text_file):
    from fasc.evaluation.text import evaluation_texts

    model = tiny_model()
    found = [evaluate(model, tokenizer, config(text_file, "perplexity", batch_tokens=b))[0] for b in (16, 64, 4096)]
    block = evaluation_texts(model, tokenizer, config(text_file, "perplexity"))[0]
    assert found[0].value == pytest.approx(math.exp(nll_by_hand(model, block.tokens)), rel=1e-5)
    assert found[0].value == pytest.approx(found[2].value, rel=1e-6)
    assert found[0].n == 12 * 15
    assert found[0].low < found[0].value < found[0].high
    assert "context 16, stride 16" in found[0].protocol


def test_kl_is_zero_to_itself_and_right_to_another(tokenizer, text_file):
    from fasc.evaluation.text import evaluation_texts

    model, dense = tiny_model(seed=0), tiny_model(seed=1)
    same = evaluate(model, tokenizer, config(text_file, "kl"), dense=tiny_model(seed=0))[0]
    assert same.value == pytest.approx(0, abs=1e-7)
    other = evaluate(model, tokenizer, config(text_file, "kl"), dense=dense)[0]
    tokens = evaluation_texts(dense, tokenizer, config(text_file, "kl"))[0].tokens
    with torch.no_grad():
        p = dense(input_ids=tokens).logits.double().log_softmax(-1)
        q = model(input_ids=tokens).logits.double().log_softmax(-1)
    assert other.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    with pytest.raises(UsageError, match="dense model"):
        evaluate(model, tokenizer, config(text_file, "kl"))


@pytest.mark.parametrize("benchmark", ["perplexity", "kl", "facts"])
def test_a_batch_that_is_not_finite_is_an_error_and_not_a_better_score(tokenizer, text_file, benchmark):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer("q")["input_ids"][0]] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"logits of .*{benchmark}"):
        evaluate(model, tokenizer, config(text_file, benchmark), dense=tiny_model())


def slow_choice(model, tokenizer, item):
    """Score every candidate in full, one at a time."""
    prompt = tokenizer(item.prompt)["input_ids"]
    scores = []
    for tokens in candidate_tokens(tokenizer, item.candidates):
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            logp = model(input_ids=ids).logits.log_softmax(-1)[0]
        scores.append(sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(tokens)))
    return max(range(len(scores)), key=scores.__getitem__)


@pytest.mark.parametrize("together", [1, 7, 1_000])
def test_the_best_candidate_is_found_exactly_with_shared_prefixes_and_prefix_candidates(tokenizer, monkeypatch, together):
    monkeypatch.setattr(_cloze, "_TOGETHER", together)
    model = tiny_model()
    words = ("New", "New York", "Newark", "Nice", "Rome", "Romeo", "Paris", "Parma", "Pa")
    items = [ClozeItem(f"prompt {i} {chr(97 + i) * (i % 5)}", words, 0, "r", "t") for i in range(25)]
    found = best_candidates(Subject(model, tokenizer, None), items, "test", batch_tokens=64)
    assert found == [slow_choice(model, tokenizer, item) for item in items]
    assert len(set(found)) > 1


def test_facts_are_many_plain_and_answerable():
    items = read_facts()
    relations = {item.relation for item in items}
    assert len(items) >= 400
    assert len(relations) >= 10
    assert len({(item.relation, item.prompt) for item in items}) == len(items)
    for item in items:
        assert "[X]" not in item.prompt
        assert item.prompt == item.prompt.strip()
        assert len(item.candidates) == len(set(item.candidates)) >= 5


def test_facts_report_every_relation_and_their_limit(tokenizer, text_file):
    scores = evaluate(tiny_model(), tokenizer, config(text_file, "facts", limit=30))
    assert scores[0].metric == "accuracy"
    assert scores[0].n == 30
    by_relation = [score for score in scores if score.metric.startswith("accuracy/relation=")]
    assert sum(score.n for score in by_relation) == 30
    again = evaluate(tiny_model(), tokenizer, config(text_file, "facts", limit=30))
    assert scores == again


def write_trex(folder):
    rows = [
        {"relation": "P36", "type": "geographic", "template": "The capital of [X] is [Y] .", "subject": s, "object": o}
        for s, o in [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid")]
    ] + [{"relation": "P1", "type": "other", "template": "[Y] contains [X] .", "subject": "a", "object": "b"}]
    (folder / "lama").mkdir(parents=True)
    with gzip.open(folder / "lama" / "trex.jsonl.gz", "wt") as stream:
        stream.write("\n".join(json.dumps(row) for row in rows))
    return folder


def test_lama_asks_up_to_the_object_among_the_relations_objects(tokenizer, text_file, tmp_path):
    folder = write_trex(tmp_path / "data")
    items = read_trex(folder / "lama" / "trex.jsonl.gz")
    assert [item.prompt for item in items] == [
        "The capital of France is",
        "The capital of Italy is",
        "The capital of Spain is",
    ]
    assert items[1].candidates == ("Paris", "Rome", "Madrid")
    assert items[1].answer == 1
    scores = evaluate(tiny_model(), tokenizer, config(text_file, "lama", data_dir=folder))
    assert {score.metric for score in scores} == {"accuracy", "accuracy/type=geographic", "accuracy/relation=P36"}
    with pytest.raises(CorpusError, match="lama/trex.jsonl.gz"):
        evaluate(tiny_model(), tokenizer, config(text_file, "lama", data_dir=tmp_path))


def test_intervals_cover_and_stay_in_range():
    assert proportion_interval(0, 10)[0] == 0
    assert proportion_interval(10, 10)[1] == pytest.approx(1)
    low, high = proportion_interval(30, 100)
    assert (round(low, 3), round(high, 3)) == (0.219, 0.396)  # Wilson 1927, as in any table
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        low, high = mean_interval(torch.randn(20, generator=generator).tolist())
        covered += low < 0 < high
    assert 0.92 < covered / 400 < 0.98


def test_unknown_benchmarks_stop_everything_before_it_starts(tokenizer, text_file):
    with pytest.raises(UnknownNameError) as caught:
        evaluate(tiny_model(), tokenizer, config(text_file, "facts", "perplexty"))
    assert "perplexity" in caught.value.hint
    assert set(BENCHMARKS) >= {"perplexity", "kl", "facts", "lama"}


def test_evaluating_on_the_calibration_text_warns(tokenizer, text_file, capsys):
    from fasc.evaluation.text import evaluation_texts

    digest = evaluation_texts(tiny_model(), tokenizer, config(text_file, "perplexity"))[0].text_digest
    evaluate(tiny_model(), tokenizer, config(text_file, "perplexity"), seen=[digest])
    assert "calibrated on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked", [{}, {"overhead": 65536}, {"channel_multiple": 512}, {"overhead": 65536, "channel_multiple": 256}]
)
def test_bench_advises_only_what_the_checkpoint_did_not_ask_for(asked):
    slow = [Comparison(what, "tokens/s", 100.0, 90.0, 0.9, 0.9, 0.9) for what in ("decode, batch 1", "decode, batch 4")]
    one_token, many = remarks(slow, 1.25, 75, {"cpu"}, BudgetConfig(param_fraction=0.8, **asked))
    assert ("--overhead 65536" in one_token) == ("overhead" not in asked)
    assert ("--channel-multiple 256" in many) == ("channel_multiple" not in asked)
    assert [text.split(" is not faster (0.90 ×)")[0] for text in (one_token, many)] == ["decode, batch 1", "decode, batch 4"]
    assert remarks([replace(one, ratio=1.1) for one in slow], 1.25, 75, {"cpu"}) == []


def test_the_peak_memory_of_a_process_is_not_that_of_the_one_that_started_it():
    ballast = b"1" * 600_000_000
    assert peak_memory() > len(ballast)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        child = pool.submit(peak_memory).result()
    assert 10_000_000 < child < peak_memory() - len(ballast) / 2
