"""Moments of blocks that are run again one by one are those of one pass, bit by bit."""

import pytest
import torch

from fasc.errors import ModelError, NonFiniteError
from fasc.model.experts import expert_layers
from fasc.model.groups import find_groups
from fasc.model.options import LayersConfig
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import Statistics
from fasc.statistics.replay import blocks_of, replay_moments
from fasc.statistics.vocabulary import VOCABULARY
from tests.conftest import CONFIGS, PARALLEL, tiny_model
from tests.processes import together
from tests.statistics.needs import EVERYTHING, INPUTS
from tests.statistics.test_passes import OPTIONS, equal
from tests.zoo.walk import build


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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["openai-gpt", "rwkv", "xlnet", "xlstm", "mamba2", "prophetnet"])
def test_blocks_may_give_more_than_hidden_states_which_nobody_reads(family, tokens):
    """A list, a state, attentions; of ProphetNet a gradient comes to one of two calls of a layer."""
    model = build(family)
    needs = EVERYTHING | {VOCABULARY}
    once, parts = collect_moments(model, tokens, needs, calibration=OPTIONS), replayed(model, tokens, needs)
    equal(once, whole(parts))
    assert (once.vocabulary is None) == (parts[0].vocabulary is None) == (family == "prophetnet")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["zaya", "zamba2"])
def test_a_block_that_reads_more_of_what_comes_before_it_is_refused(family, tokens):
    with pytest.raises(ModelError, match="reads more of what comes before it than hidden states"):
        replayed(build(family), tokens, EVERYTHING | {VOCABULARY})


def test_a_state_that_is_handed_on_is_seen_wherever_it_is_put(tokens):
    """In a list among the arguments, from the first block to the last."""
    model, state = tiny_model(layers=3), []
    first, last = model.model.layers[0].forward, model.model.layers[2].forward

    def leaves(*args, **kwargs):
        state[:] = [first(*args, **kwargs)]
        return state[0]

    model.model.layers[0].forward = leaves
    model.model.layers[2].register_forward_pre_hook(
        lambda _module, args, kwargs: (args, kwargs | {"state": state}), with_kwargs=True
    )
    model.model.layers[2].forward = lambda hidden, state, **kwargs: last(hidden + state[0], **kwargs)
    with pytest.raises(ModelError, match="block 2 of .* reads more of what comes before it"):
        replayed(model, tokens, EVERYTHING)


def test_a_model_that_reads_more_of_its_blocks_at_its_end_is_refused(tokens):
    model, seen = tiny_model(layers=3), []
    model.model.layers[1].register_forward_hook(lambda _module, _args, output: seen.append(2 * output))
    model.model.norm.register_forward_pre_hook(lambda _module, args: (args[0] + seen[-1],))
    with pytest.raises(ModelError, match="reads more of its blocks than hidden states"):
        replayed(model, tokens, EVERYTHING)


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
    """What the backward pass holds on to does not grow with the depth, as it does in one pass."""

    def held(layers, measure):
        alive, most = 0, 0

        class Box:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor, self.size = tensor, tensor.nbytes
                alive += self.size
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.tensor):
            measure(tiny_model(layers=layers))
        return most

    def once(model):
        collect_moments(model, tokens, EVERYTHING, calibration=OPTIONS)

    assert held(6, lambda model: replayed(model, tokens, EVERYTHING)) == held(
        2, lambda model: replayed(model, tokens, EVERYTHING)
    )
    assert held(6, once) > 2 * held(2, once)


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


def test_blocks_without_groups_are_passed_through_and_give_no_part(tokens):
    model, layers = tiny_model(layers=4), LayersConfig(exclude=("model.layers.0.*", "model.layers.2.*"))
    needs = EVERYTHING | {VOCABULARY}
    once = collect_moments(model, tokens, needs, calibration=OPTIONS, layers=layers)
    parts = replayed(model, tokens, needs, layers=layers)
    assert list(parts) == [3, 1]
    equal(once, Statistics(parts[1].groups | parts[3].groups, once.meta))
    for key, value in once.vocabulary.tensors().items():
        assert torch.equal(value, parts[1].vocabulary.tensors()[key]), key
    assert list(replayed(model, tokens, needs, layers=layers, finished={1})) == [3]
    assert replayed(model, tokens, needs, layers=layers, finished={1, 3}) == {}


def test_overflow_is_said_to_be_that(tokens):
    model = tiny_model(layers=3)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match="block 1 reads"):
        replayed(model, tokens, INPUTS)


def test_several_processes_replay_their_own_batches(tokens, tmp_path):
    def work(processes):
        parts = replayed(tiny_model(layers=3), tokens, EVERYTHING | {VOCABULARY}, OPTIONS.model_copy(update={"batch_tokens": 80}))
        if processes is None or processes.first:
            torch.save(
                {name: group.input.matrix for part in parts.values() for name, group in part.groups.items()}, tmp_path / "m"
            )
        return sorted(parts)

    alone = work(None)
    one = torch.load(tmp_path / "m", weights_only=True)
    assert together(2, tmp_path, work) == [str(alone)] * 2
    for name, matrix in torch.load(tmp_path / "m", weights_only=True).items():
        torch.testing.assert_close(matrix, one[name], rtol=1e-4, atol=1e-5)


def test_every_block_is_one_also_if_nothing_of_it_is_measured():
    model = tiny_model(layers=3)
    groups = find_groups(model, LayersConfig(exclude=("model.layers.1.*",)))
    blocks = blocks_of(model, groups)
    assert [(name, len(own) > 0) for name, own in blocks] == [
        ("model.layers.0", True),
        ("model.layers.1", False),
        ("model.layers.2", True),
    ]
