"""Statistics are sums: batches, captures and files of parts of a text add up to the moments of the whole.

Tolerance: 1e-4 of each value and 1e-5 of the largest of its tensor. Sums of a batch are float32, merging is float64.
"""

import random
from dataclasses import replace

import pytest
import torch

from fasc.errors import StatisticsError
from fasc.model.experts import expert_layers
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.statistics.accumulators import CrossSum, SymmetricSum, VectorSum
from fasc.statistics.capture import Batch, GroupCapture
from fasc.statistics.collect import collect_moments
from fasc.statistics.hooks import capturing
from fasc.statistics.moments import Statistics
from fasc.statistics.objective import summed_nll
from fasc.statistics.options import CalibrationConfig
from tests.conftest import tiny_model
from tests.reference import covariance
from tests.statistics.needs import COVARIANCES, EVERYTHING, GRADIENTS, INPUTS
from tests.statistics.tensors import tensors_of


def parts_of(tokens, number, seed):
    """The sequences in another order, cut at random places into so many parts."""
    mixed = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    places = sorted(random.Random(seed).sample(range(1, len(tokens)), number - 1))
    return mixed, torch.tensor_split(mixed, places)


def assert_same_moments(merged, whole):
    assert list(merged.groups) == list(whole.groups)
    tensors = dict(tensors_of(merged))
    assert tensors.keys() == dict(tensors_of(whole)).keys()
    for key, value in tensors_of(whole):
        torch.testing.assert_close(tensors[key], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()) + 1e-12, msg=key)
    for name, group in whole.groups.items():
        other = merged.groups[name]
        assert (other.tokens, other.text_tokens, other.sequences) == (group.tokens, group.text_tokens, group.sequences)
        assert other.share == group.share
    assert merged.meta["nll"] == pytest.approx(whole.meta["nll"], rel=1e-5)
    assert merged.meta["scored_tokens"] == whole.meta["scored_tokens"]


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_files_of_the_parts_of_a_text_add_up_to_one_pass_over_it(tokens, tmp_path, number, seed):
    mixed, parts = parts_of(tokens, number, seed)
    model = tiny_model("llama" if seed else "gpt2")
    whole = collect_moments(model, mixed, EVERYTHING)
    files = [collect_moments(model, part, EVERYTHING).save(tmp_path / f"{i}.safetensors") for i, part in enumerate(parts)]
    merged = Statistics.load(files[0])
    for file in files[1:]:
        merged = merged.merge(Statistics.load(file))
    assert_same_moments(merged, whole)
    assert torch.equal(merged.text, mixed)
    assert merged.meta["token_digest"] == whole.meta["token_digest"], "the same text, however it was read"
    assert_same_moments(Statistics.load(merged.save(tmp_path / "merged.safetensors")), whole)


@pytest.mark.parametrize("number", [2, 3])
def test_parts_of_a_text_add_up_for_every_expert(mixture, tokens, number):
    mixed, parts = parts_of(tokens, number, seed=number)
    with expert_layers(mixture):
        whole = collect_moments(mixture, mixed, EVERYTHING)
        first, *others = (collect_moments(mixture, part, EVERYTHING) for part in parts)
    for other in others:
        first = first.merge(other)
    assert_same_moments(first, whole)
    assert {round(group.share, 3) for group in whole.groups.values()} > {1.0}, "experts read a part of the text"


def test_an_expert_that_is_idle_in_one_part_has_the_moments_of_the_other(mixture, tokens, capsys):
    parts = tokens[:1, :3], tokens[1:, :3]
    with expert_layers(mixture):
        whole = collect_moments(mixture, tokens[:, :3], EVERYTHING)
        little, rest = (collect_moments(mixture, part, EVERYTHING) for part in parts)
    assert "got no token" in capsys.readouterr().err
    assert little.groups.keys() < whole.groups.keys()
    assert_same_moments(little.merge(rest), whole)
    assert list(rest.merge(little).groups) == list(whole.groups), "in the model's order, whichever comes first"


@pytest.mark.parametrize("batch_tokens", [20, 100, 100_000])
def test_batches_add_up_to_one_pass_with_every_extra(mixture, tokens, batch_tokens):
    with expert_layers(mixture):
        whole = collect_moments(mixture, tokens, EVERYTHING)
        assert_same_moments(
            collect_moments(mixture, tokens, EVERYTHING, calibration=CalibrationConfig(batch_tokens=batch_tokens)), whole
        )


def test_running_sums_merge_before_they_are_published(model, tokens):
    """As processes would do that share a text."""

    def run(part):
        captures = [GroupCapture(group, EVERYTHING, model.device) for group in find_groups(model, LayersConfig())]
        model.requires_grad_(False)
        handle = model.get_input_embeddings().register_forward_hook(lambda _m, _a, output: output.requires_grad_())
        with capturing(model, captures):
            for capture in captures:
                capture.begin_batch(Batch.of(part, None))
                capture.listening = True
            summed_nll(model(input_ids=part, use_cache=False).logits, part, None, "corpus").backward()
        handle.remove()
        return captures

    whole = [capture.publish() for capture in run(tokens)]
    first, *others = (run(part) for part in tokens.tensor_split([5, 11]))
    for captures in others:
        for capture, other in zip(first, captures, strict=True):
            capture.merge(other)
    meta = {"nll": 0.0, "scored_tokens": 1}
    merged = Statistics({capture.group.name: capture.publish() for capture in first}, meta)
    assert_same_moments(merged, Statistics({group.group.name: group for group in whole}, meta))
    with pytest.raises(StatisticsError, match="other moments"):
        first[0].merge(first[1])


@pytest.mark.parametrize("flush", [1, 40, 10_000])
def test_sums_merge_whether_they_have_spilled_into_float64_or_not(monkeypatch, flush):
    monkeypatch.setattr("fasc.statistics.accumulators.FLUSH_TOKENS", flush)
    x, h = torch.randn(60, 7), torch.randn(60, 5)
    vectors, squares, crosses = ([kind() for _ in range(2)] for kind in (
        lambda: VectorSum(7, x.device), lambda: SymmetricSum(7, x.device), lambda: CrossSum((7, 5), x.device)
    ))  # fmt: skip
    for part, rows in enumerate((slice(0, 41), slice(41, 60))):
        vectors[part].add(x[rows])
        squares[part].add(x[rows])
        crosses[part].add(x[rows], h[rows])
    for one, other in (vectors, squares, crosses):
        one.merge(other)
    x, h = x.double(), h.double()
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(vectors[0].mean(60), x.mean(0), **close)
    torch.testing.assert_close(squares[0].covariance(x.mean(0), 60), covariance(x), **close)
    torch.testing.assert_close(crosses[0].covariance((x.mean(0), h.mean(0)), 60), covariance(x, h), **close)


def test_merging_does_not_change_the_parts_and_their_order_does_not_matter(model, tokens):
    one, two = (collect_moments(model, part, EVERYTHING) for part in (tokens[:9], tokens[9:]))
    before = [value.clone() for _, value in tensors_of(one)]
    both, other_way = one.merge(two), two.merge(one)
    assert all(torch.equal(value, old) for (_, value), old in zip(tensors_of(one), before, strict=True))
    tensors = dict(tensors_of(other_way))
    for key, value in tensors_of(both):
        if "sequences/" not in key:
            torch.testing.assert_close(tensors[key], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()))
    matrix = both.groups["model.layers.0.mlp.down_proj"].input.matrix
    assert torch.equal(matrix, matrix.mT)


def test_texts_of_different_lengths_merge_weighted_by_their_tokens(model, tokens):
    long, short = collect_moments(model, tokens[:4], COVARIANCES), collect_moments(model, tokens[4:, :6], COVARIANCES)
    merged = long.merge(short)
    name = "model.layers.1.self_attn.o_proj"
    weights = 4 * 20, 20 * 6
    parts = [part.groups[name].input.mean.double() * weight for part, weight in zip((long, short), weights, strict=True)]
    torch.testing.assert_close(merged.groups[name].input.mean.double(), sum(parts) / sum(weights))
    assert merged.text is None, "sequences of two lengths are no one tensor"
    assert merged.meta["token_digest"] == short.merge(long).meta["token_digest"]
    assert merged.meta["token_digest"] not in {long.meta["token_digest"], short.meta["token_digest"]}


def test_only_the_same_moments_of_the_same_model_on_other_text_are_merged(model, tokens):
    one, two = (collect_moments(model, part, GRADIENTS) for part in (tokens[:12], tokens[12:]))
    with pytest.raises(StatisticsError, match="another model"):
        one.merge(collect_moments(tiny_model(seed=1), tokens[12:], GRADIENTS))
    with pytest.raises(StatisticsError, match="other layers"):
        one.merge(collect_moments(model, tokens[12:], GRADIENTS, layers=LayersConfig(exclude=("*.o_proj",))))
    with pytest.raises(StatisticsError, match="other moments"):
        one.merge(collect_moments(model, tokens[12:], INPUTS))
    with pytest.raises(StatisticsError, match="other moments"):
        one.merge(collect_moments(model, tokens[12:], GRADIENTS, calibration=CalibrationConfig(labels="sampled")))
    for twice in (one, one.merge(two), replace(two, text=None).merge(one)):
        with pytest.raises(StatisticsError, match=f"share a text .*{one.meta['token_digest'][:12]}"):
            twice.merge(one)


def test_merged_statistics_say_which_texts_they_were_measured_on(model, tokens):
    parts = [
        collect_moments(model, tokens[rows], INPUTS, calibration=CalibrationConfig(corpus=corpus, sequences=8))
        for rows, corpus in ((slice(0, 8), "a.txt"), (slice(8, 16), "b.txt"), (slice(16, 24), "a.txt"))
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert [part["token_digest"] for part in merged.meta["parts"]] == [part.meta["token_digest"] for part in parts]
    assert merged.meta["calibration"]["corpus"] == "a.txt,b.txt"
    assert merged.meta["calibration"]["sequences"] == 24
    assert merged.require(INPUTS) is None
