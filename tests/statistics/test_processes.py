"""Moments that several processes measured are those of one, up to the order of summation."""

import pytest
import torch

from fasc.errors import StatisticsError
from fasc.methods import METHODS
from fasc.model.experts import expert_layers
from fasc.statistics.accumulators import FLUSH_TOKENS
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import Need, Statistics
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.vocabulary import VOCABULARY
from tests.conftest import tiny_model
from tests.processes import together

NEEDS = frozenset().union(*(method.needs_in(method.scopes) for method in METHODS.values()))
NEEDS |= {VOCABULARY, Need("cross", "group"), Need("sequences", "group")}


def calibration(**options):
    return CalibrationConfig(batch_tokens=40, **options)


def measured_by(count, folder, model, tokens, needs=NEEDS, mask=None, **options):
    """The file that ``count`` processes write."""
    file = folder / "statistics.safetensors"

    def work(processes):
        with expert_layers(model):
            statistics = collect_moments(model, tokens, needs, calibration=calibration(**options), mask=mask)
        if processes.first:
            return statistics.save(file)
        with pytest.raises(StatisticsError, match="no moments"):
            statistics.save(file)
        return None

    said = together(count, folder, work)
    assert said[1:] == ["None"] * (count - 1), said
    return Statistics.load(file)


def measured_alone(model, tokens, needs=NEEDS, mask=None, **options):
    with expert_layers(model):
        return collect_moments(model, tokens, needs, calibration=calibration(**options), mask=mask)


def require_bound(one, other, tokens):
    """The stated bound: every entry to 6 n 2⁻²⁴ √(E[a²] E[b²]), n tokens in a float32 sum; and what is seen, 2e-6 of the largest."""
    share = 6 * min(tokens, FLUSH_TOKENS) * 2.0**-24
    assert list(one.groups) == list(other.groups)
    for name, first in one.groups.items():
        second = other.groups[name]
        assert (first.tokens, first.text_tokens, first.sequences) == (second.tokens, second.text_tokens, second.sequences)
        x = _covariance_near(first.input, second.input, share)
        for unit, moment in first.gradients.items():
            g = _covariance_near(moment.covariance, second.gradients[unit].covariance, share)
            if moment.cross is not None:
                _near(moment.cross, second.gradients[unit].cross, share * x.outer(g))
        _extras_near(first.extras, second.extras, share)
    assert (one.vocabulary is None) == (other.vocabulary is None)
    if one.vocabulary is not None:
        _extras_near(one.vocabulary.tensors(), other.vocabulary.tensors(), share)


def _near(one, other, bound):
    apart = (one.double() - other.double()).abs()
    assert bool((apart <= bound).all())
    assert float(apart.max()) <= 2e-6 * float(one.abs().max().clamp(min=1e-30))


def _covariance_near(one, other, share):
    """Gives √E[a²]."""
    size = (one.matrix.diagonal().double() + one.mean.double().square()).sqrt()
    _near(one.matrix, other.matrix, share * size.outer(size))
    _near(one.mean, other.mean, share * size)
    return size


def _extras_near(one, other, share):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if key.startswith("sequences/"):  # each sequence's own, whoever read it
            assert torch.equal(value, other[key])
        else:
            torch.testing.assert_close(value, other[key], rtol=share, atol=2e-6 * float(value.abs().max()))


@pytest.mark.parametrize("labels", ["corpus", "sampled"])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_measure_what_one_measures(count, labels, tokens, tmp_path):
    model = tiny_model()
    one, several = measured_alone(model, tokens, labels=labels), measured_by(count, tmp_path, model, tokens, labels=labels)
    require_bound(one, several, tokens.numel())
    assert several.meta["nll"] == pytest.approx(one.meta["nll"], rel=1e-12)
    assert several.meta["scored_tokens"] == one.meta["scored_tokens"]
    assert (one.meta["processes"], one.meta["tokens_by_process"]) == (1, [480])
    assert (several.meta["processes"], several.meta["tokens_by_process"]) == (count, [480 // count] * count)
    assert torch.equal(several.text, tokens)


def test_a_process_may_have_fewer_sequences(tokens, tmp_path):
    model = tiny_model()
    several = measured_by(4, tmp_path, model, tokens[:5], labels="sampled")
    assert several.meta["tokens_by_process"] == [20, 20, 20, 40]
    with expert_layers(model):
        alone = CalibrationConfig(batch_tokens=20, labels="sampled")  # five batches, as the four processes make them
        require_bound(collect_moments(model, tokens[:5], NEEDS, calibration=alone), several, 100)


def test_padding_counts_for_nobody(tokens, tmp_path):
    model = tiny_model()
    mask = (torch.arange(20) < torch.arange(24)[:, None].remainder(15) + 5).long()
    one, several = measured_alone(model, tokens, mask=mask), measured_by(2, tmp_path, model, tokens, mask=mask)
    require_bound(one, several, int(mask.sum()))
    assert several.meta["tokens_by_process"] == [int(mask[:12].sum()), int(mask[12:].sum())]


def test_an_expert_that_one_process_does_not_hear_has_the_moments_of_the_others(mixture, tokens, tmp_path):
    one, several = measured_alone(mixture, tokens[:4]), measured_by(4, tmp_path, mixture, tokens[:4])
    with expert_layers(mixture):
        alone = collect_moments(mixture, tokens[:4], NEEDS, calibration=CalibrationConfig(batch_tokens=20))
    assert list(one.groups) == list(several.groups)
    require_bound(alone, several, 80)


def test_two_calls_of_as_many_processes_give_the_same_bits(tokens, tmp_path):
    model = tiny_model()
    for again in ("one", "two"):
        (tmp_path / again).mkdir()
        measured_by(4, tmp_path / again, model, tokens, labels="sampled").save(tmp_path / f"{again}.safetensors")
    one, two = (Statistics.load(tmp_path / f"{again}.safetensors") for again in ("one", "two"))
    for name, group in one.groups.items():
        assert torch.equal(group.input.matrix, two.groups[name].input.matrix)
        for unit, moment in group.gradients.items():
            assert torch.equal(moment.covariance.matrix, two.groups[name].gradients[unit].covariance.matrix)


def test_processes_with_other_texts_are_refused_before_the_work(tokens, tmp_path):
    model = tiny_model()

    def work(processes):
        return collect_moments(model, tokens.flip(0) if processes.rank else tokens, NEEDS)

    said = together(2, tmp_path, work)
    assert said[0] == said[1]
    assert said[0].startswith("error: process 1 has another text than process 0")

    def other_seed(processes):
        return collect_moments(model, tokens, NEEDS, calibration=calibration(labels="sampled", seed=processes.rank))

    assert together(2, tmp_path, other_seed) == ["error: process 1 has another seed than process 0 (1, not 0)"] * 2


def test_sequences_that_were_passed_over_have_labels_too_so_that_parts_merge_to_the_whole(tokens):
    model, needs = tiny_model(), METHODS["fasc"].needs
    whole = measured_alone(model, tokens, needs, labels="sampled")
    parts = [measured_alone(model, tokens[at], needs, labels="sampled", skip=at.start) for at in (slice(0, 8), slice(8, 24))]
    merged = parts[0].merge(parts[1])
    assert "processes" not in merged.meta
    assert [part["tokens_by_process"] for part in merged.meta["parts"]] == [[160], [320]]
    for name, group in whole.groups.items():
        for unit, moment in group.gradients.items():
            torch.testing.assert_close(
                merged.groups[name].gradients[unit].covariance.matrix, moment.covariance.matrix, rtol=1e-4, atol=1e-5
            )


def test_sampled_labels_do_not_depend_on_the_batch(tokens):
    model, needs = tiny_model(), METHODS["fasc"].needs
    small, large = (
        collect_moments(model, tokens, needs, calibration=CalibrationConfig(batch_tokens=size, labels="sampled"))
        for size in (20, 480)
    )
    assert small.meta["nll"] == pytest.approx(large.meta["nll"], rel=1e-5)
