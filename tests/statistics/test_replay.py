"""Moments of blocks that are run again one by one are those of one pass, bit by bit."""

import pytest
import torch

from fasc.errors import ModelError
from fasc.model.experts import expert_layers
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import Statistics
from fasc.statistics.replay import blocks_of, replay_moments
from fasc.statistics.vocabulary import VOCABULARY
from tests.conftest import CONFIGS, PARALLEL, tiny_model
from tests.statistics.needs import EVERYTHING, INPUTS
from tests.statistics.test_passes import OPTIONS, equal


def replayed(model, tokens, needs, options=OPTIONS, **more):
    """By number of block, in the order in which they came."""
    found = {}
    replay_moments(model, tokens, needs, found.__setitem__, calibration=options, **more)
    return found


def whole(parts):
    """All blocks' together."""
    return Statistics({name: group for number in sorted(parts) for name, group in parts[number].groups.items()}, parts[0].meta)


@pytest.mark.parametrize("architecture", [*CONFIGS, *PARALLEL])
def test_replayed_blocks_give_the_bits_of_one_pass(architecture, tokens):
    same_bits(tiny_model(architecture), tokens)


def test_experts_see_the_tokens_of_one_pass(mixture, tokens):
    same_bits(mixture, tokens)


def same_bits(model, tokens):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with expert_layers(model):
        needs = EVERYTHING | {VOCABULARY}
        once = collect_moments(model, tokens, needs, calibration=OPTIONS)
        parts = replayed(model, tokens, needs)
        assert list(parts) == [1, 0], "the last block first"
        equal(once, whole(parts))
    for key, value in once.vocabulary.tensors().items():
        assert torch.equal(value, parts[0].vocabulary.tensors()[key]), key
    assert parts[1].vocabulary is None
    assert parts[0].meta["nll"] == parts[1].meta["nll"] == once.meta["nll"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("options", [{"labels": "corpus"}, {"batch_tokens": 48}, {"mixed_precision": True}])
def test_the_way_of_measuring_counts_as_in_one_pass(options, tokens):
    model, options = tiny_model(layers=4), OPTIONS.model_copy(update=options)
    equal(collect_moments(model, tokens, EVERYTHING, calibration=options), whole(replayed(model, tokens, EVERYTHING, options)))


def test_blocks_that_are_finished_are_passed_over_and_change_nothing(tokens):
    model = tiny_model(layers=4)
    once, parts = replayed(model, tokens, EVERYTHING), replayed(model, tokens, EVERYTHING, finished={3, 1})
    assert list(parts) == [2, 0]
    for number, part in parts.items():
        equal(once[number], part)


def test_moments_of_inputs_alone_need_no_gradient(tokens):
    model = tiny_model(layers=3)
    equal(collect_moments(model, tokens, INPUTS, calibration=OPTIONS), whole(replayed(model, tokens, INPUTS)))


def test_one_block_at_a_time_has_a_graph(tokens):
    """What the backward pass holds on to does not grow with the depth."""

    def held(layers):
        kept, most = 0, 0
        sizes = {}

        def pack(tensor):
            nonlocal kept, most
            kept += tensor.nbytes
            most = max(most, kept)
            sizes[id(box := [tensor])] = tensor.nbytes
            return box

        model = tiny_model(layers=layers)

        def before(*_):
            nonlocal kept
            kept = 0  # the graph of the block before is gone

        for block in model.model.layers:
            block.register_forward_pre_hook(before)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box[0]):
            replayed(model, tokens, EVERYTHING)
        return most

    assert held(6) == held(2)


def test_what_cannot_be_replayed_is_refused_before_anything_is_measured(tokens):
    model = tiny_model(layers=3)
    real = model.model.layers[1].forward
    model.model.layers[1].forward = lambda *args, **kwargs: real(2 * args[0], *args[1:], **kwargs)
    replayed(model, tokens, INPUTS)  # what a block does inside is its own affair
    model = tiny_model(layers=3)
    model.model.layers[1].register_forward_pre_hook(lambda _module, args: (2 * args[0], *args[1:]))
    with pytest.raises(ModelError, match="do not read what the one before them gives"):
        replayed(model, tokens, INPUTS)
    model = tiny_model(layers=3)
    model.config.num_kv_shared_layers = 1
    with pytest.raises(ModelError, match="keys and values of other blocks") as refused:
        replayed(model, tokens, INPUTS)
    assert "--max-memory" in refused.value.hint


def test_every_block_is_one_also_if_nothing_of_it_is_measured():
    model = tiny_model(layers=3)
    groups = find_groups(model, LayersConfig(exclude=("model.layers.1.*",)))
    blocks = blocks_of(model, groups)
    assert [(name, len(own) > 0) for name, own in blocks] == [
        ("model.layers.0", True),
        ("model.layers.1", False),
        ("model.layers.2", True),
    ]
