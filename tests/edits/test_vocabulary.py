"""Embedding and head in few bits: each where its error is felt, one matrix where they are tied."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from fasc.compression.compress import carry_out
from fasc.edits.vocabulary import VocabularyBits
from fasc.errors import BudgetError, ModelError, StatisticsError, UsageError
from fasc.forecast.vocabulary import ends_of, measured_loss, vocabulary_loss, vocabulary_noise
from fasc.model.vocabulary import find_vocabulary
from fasc.planning.options import MethodConfig
from fasc.serving.pack_quantized import save_pack_quantized
from fasc.serving.quantizer import attach
from fasc.stages.compress import needs_of
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import Statistics
from fasc.statistics.vocabulary import VOCABULARY
from tests.conftest import in_new_process, logits, tiny_model

NAMES = ["llama", "mistral", "gemma3", "gpt2", "phi"]
NEEDS = needs_of((MethodConfig(name="fasc", bits=(4,), bits_vocabulary=True),))


def edits_of(model, bits, group=16):
    found = find_vocabulary(model)
    return [VocabularyBits.of(found, end, bits, group) for end in ends_of(found)]


def rounded_copy(model, statistics, bits):
    small = copy.deepcopy(model)
    if find_vocabulary(model).tied:
        small.tie_weights()
    for edit in edits_of(small, bits):
        edit.require(statistics)
        edit.apply(small, statistics)
    return small


@pytest.fixture(scope="module")
def moments(tokens):
    known = {}

    def of(name):
        if name not in known:
            known[name] = collect_moments(tiny_model(name), tokens, frozenset({VOCABULARY}))
        return known[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_the_moments_are_those_of_autograd(name, tokens):
    """Against gradients of the weights themselves: one token at a time, the row that is read and the logits that are said."""
    model = tiny_model(name)
    ids = tokens[:3, :6]
    statistics = collect_moments(model, ids, frozenset({VOCABULARY}))
    found = statistics.vocabulary
    assert found.frequency.sum() == pytest.approx(1.0)
    counts = torch.bincount(ids.flatten(), minlength=128) / ids.numel()
    torch.testing.assert_close(found.frequency, counts.float())
    inputs = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _m, args: inputs.append(args[0].flatten(0, 1)))
    logits(model, ids)
    handle.remove()
    torch.testing.assert_close(found.input, inputs[0].mT @ inputs[0] / ids.numel(), rtol=1e-3, atol=1e-4)
    assert (found.scale >= 0).all()
    assert float(found.scale.sum()) > 0
    assert float(torch.linalg.eigvalsh(found.gradient.double()).min()) > -1e-4 * float(found.gradient.trace())


@pytest.mark.parametrize("name", NAMES)
def test_eight_bits_change_little_and_fewer_bits_more(name, moments, tokens):
    model = tiny_model(name)
    dense = logits(model, tokens)
    errors = [float((logits(rounded_copy(model, moments(name), bits), tokens) - dense).square().mean()) for bits in (8, 5, 3)]
    assert errors == sorted(errors)
    assert errors[0] < 1e-3 * float(dense.square().mean())


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_that_are_read_are_those_of_the_table(name, moments, tokens):
    model = tiny_model(name)
    small = rounded_copy(model, moments(name), 8)
    ids = tokens[:2]
    before, after = (one.get_input_embeddings()(ids).detach() for one in (model, small))
    torch.testing.assert_close(after, before, rtol=0, atol=0.03 * float(before.abs().max()))
    table = small.get_input_embeddings().table.weight
    torch.testing.assert_close(after, find_vocabulary(model).scale * table[ids], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_forecast_is_what_rounding_loses(name, bits, moments):
    model, found = tiny_model(name), find_vocabulary(tiny_model(name))
    for edit in edits_of(model, bits):
        module = model.get_submodule(found.head if edit.end == "head" else found.embedding)
        weight = module.weight.detach().clone()
        noise = vocabulary_noise(weight, moments(name).vocabulary, edit.end, 16, edit.damping)
        small = copy.deepcopy(model)
        edit.apply(small, moments(name))
        now = small.get_submodule(edit.head).weight if edit.end == "head" else small.get_submodule(edit.embedding).table.weight
        lost = measured_loss(weight - now.detach(), moments(name).vocabulary, edit.end)
        assert vocabulary_loss(noise, bits) == pytest.approx(lost, rel=0.6)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_gives_the_same_logits_and_holds_one_copy_of_a_tied_matrix(name, moments, tokens, tmp_path):
    model = rounded_copy(tiny_model(name), moments(name), 4)
    attach(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    generate = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2}
    assert torch.equal(again.generate(tokens[:2, :5], **generate), model.generate(tokens[:2, :5], **generate))
    codes = [key for key in again.state_dict() if key.endswith("codes")]
    assert len(codes) == find_vocabulary(tiny_model(name)).matrices


def test_a_new_process_loads_it(moments, tokens, tmp_path):
    model = rounded_copy(tiny_model(), moments("llama"), 4)
    attach(model)
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(float(model(input_ids=torch.arange(12)[None]).logits.double().sum()))"
    )
    expected = float(logits(model, torch.arange(12)[None]).double().sum())
    assert float(in_new_process(script, tmp_path).split()[-1]) == pytest.approx(expected, rel=1e-6)


@pytest.fixture(scope="module")
def everything(tokens):
    return collect_moments(tiny_model(), tokens, NEEDS)


def test_a_budget_below_what_is_outside_of_the_blocks_can_be_kept(everything):
    """The table has 16,384 bytes of the tiny model's 78,000: without bits for it 17 kB leave nothing for the layers."""
    header = plan(tiny_model(), everything, bits=(3, 4, 8), bits_group=16, max_kl=1.0).model.header_bytes
    with pytest.raises(BudgetError):
        plan(tiny_model(), everything, bits=(3, 4, 8), bits_group=16, max_bytes=header + 17_000)
    model = tiny_model()
    made = plan(model, everything, bits=(3, 4, 8), bits_group=16, bits_vocabulary=True, max_bytes=header + 17_000)
    assert made.totals["bytes"] <= 17_000
    assert [edit.edit for edit in made.edits].count("vocabulary") == 1
    assert "the embedding and head in" in str(made)
    carry_out(model, everything, made)
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert held == made.totals["bytes"]


def test_more_to_choose_from_loses_no_more(everything):
    budget = {"bits": (3, 4, 6, 8, 16), "bits_group": 16, "max_bytes": 60_000}
    assert plan(tiny_model(), everything, bits_vocabulary=True, **budget).predicted_loss <= plan(
        tiny_model(), everything, **budget
    ).predicted_loss * (1 + 1e-9)


def test_moments_at_both_ends_are_stored_and_merged(tokens, tmp_path):
    parts = [collect_moments(tiny_model(), part, frozenset({VOCABULARY})) for part in tokens.split([9, 15])]
    both = parts[0].merge(parts[1]).vocabulary
    whole = collect_moments(tiny_model(), tokens, frozenset({VOCABULARY})).vocabulary
    torch.testing.assert_close(both.frequency, whole.frequency)
    torch.testing.assert_close(both.input, whole.input, rtol=1e-4, atol=1e-5)
    parts[0].save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors").vocabulary
    assert all(torch.equal(value, again.tensors()[key]) for key, value in parts[0].vocabulary.tensors().items())


def test_padding_counts_for_nothing_and_half_precision_is_summed_in_single(tokens):
    ids = tokens[:6].clone()
    whole = collect_moments(tiny_model(), ids[:, :15], frozenset({VOCABULARY})).vocabulary
    mask = torch.ones_like(ids)
    mask[:, 15:] = 0
    padded = collect_moments(tiny_model(), ids, frozenset({VOCABULARY}), mask=mask).vocabulary
    torch.testing.assert_close(padded.frequency, whole.frequency)
    torch.testing.assert_close(padded.input, whole.input, rtol=1e-4, atol=1e-5)
    short = collect_moments(tiny_model(dtype=torch.bfloat16), ids, frozenset({VOCABULARY})).vocabulary
    assert short.gradient.dtype == short.scale.dtype == torch.float32
    torch.testing.assert_close(short.input.trace(), whole.input.trace(), rtol=0.2, atol=0)


def test_what_cannot_be_is_refused_in_one_line(everything, moments, tmp_path):
    with pytest.raises(BudgetError, match="no bits from which embedding and head"):
        plan(tiny_model(), everything, bits_vocabulary=True, max_bytes=40_000)
    lacking = replace(everything, vocabulary=None)
    with pytest.raises(StatisticsError, match="embedding and head"):
        plan(tiny_model(), lacking, bits=(4,), bits_vocabulary=True, max_bytes=40_000)
    with pytest.raises(UsageError, match="of another kind \\(vocabulary\\)"):
        save_pack_quantized(rounded_copy(tiny_model(), moments("llama"), 4), None, tmp_path / "out", None)
    with pytest.raises(ModelError, match="no plain matrix of 64×32"):
        edits_of(tiny_model(), 4)[0].model_copy(update={"tokens": 64}).build(tiny_model())
