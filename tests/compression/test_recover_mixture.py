"""Recovery of a mixture: routers are trained beside the layers that were replaced, and experts that were not stay as they are."""

import pytest
import torch

import fasc
from fasc.compression.options import RecoveryConfig
from fasc.compression.recover import recover, trained_modules
from fasc.edits.skip import Skip
from fasc.edits.structure import edited_layers
from fasc.edits.unfuse import Unfuse
from fasc.model.experts import routers
from tests.compression.test_recover import apart, others
from tests.zoo.walk import build, tokens_for

CONFIG = RecoveryConfig(batch_tokens=80, learning_rate=3e-3)


@pytest.fixture
def compressed(mixture, tokens):
    """A mixture, and itself with the experts of some low rank, one of them gone."""
    dense = type(mixture)(mixture.config).eval()
    dense.load_state_dict(mixture.state_dict())
    statistics = fasc.collect(mixture, corpus=tokens, sequences=24, sequence_length=20)
    made = fasc.plan(mixture, statistics, param_fraction=0.6, damping=1e-2, layouts="dense,factors,experts")
    return dense, fasc.compress(mixture, statistics, made).model


def test_routers_that_were_pushed_off_are_brought_back(mixture, tokens):
    dense = type(mixture)(mixture.config).eval()
    dense.load_state_dict(mixture.state_dict())
    Unfuse.of(mixture).apply(mixture, None)
    names = routers(mixture)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in names:
            weight = mixture.get_submodule(name).weight
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    before = apart(dense, mixture, tokens)
    done = recover(mixture, dense, others(), CONFIG, layers=[mixture.get_submodule(name) for name in names])
    assert done.after < 0.7 * done.before
    assert apart(dense, mixture, tokens) < 0.7 * before


def test_what_is_trained_is_what_was_replaced_and_the_routers(compressed):
    dense, small = compressed
    old = {name: parameter.clone() for name, parameter in small.named_parameters()}
    names = trained_modules(small)
    assert set(routers(small)) < set(names)
    done = recover(small, dense, others(60), CONFIG)
    changed = {name for name, parameter in small.named_parameters() if not torch.equal(old[name], parameter)}
    assert done.after < done.before
    assert all(any(name.startswith(f"{module}.") for module in names) for name in changed)
    assert all(f"{router}.weight" in changed for router in routers(small))


def test_routers_are_trained_beside_means_alone(mixture, tokens):
    statistics = fasc.collect(mixture, corpus=tokens, sequences=24, sequence_length=20)
    made = fasc.plan(mixture, statistics, param_fraction=0.9, damping=1e-2, layouts="dense,experts")
    gone = [edit.sublayer for edit in made.edits if isinstance(edit, Skip)]
    small = fasc.compress(mixture, statistics, made).model
    assert trained_modules(small) == [*gone, *routers(small)]
    assert len(gone) > 0 and len(routers(small)) == 2


def test_experts_that_no_edit_touched_are_not_trained(mixture, tokens):
    statistics = fasc.collect(mixture, corpus=tokens, sequences=24, sequence_length=20)
    made = fasc.plan(mixture, statistics, param_fraction=0.98, damping=1e-2, layouts="dense,factors")
    small = fasc.compress(mixture, statistics, made).model
    touched = {name for edit in made.edits[1:] for name in edit.touches}
    experts = {layer.name for layer in made.layers if ".experts." in layer.name}
    assert touched & experts and experts - touched
    assert set(edited_layers(small)) == touched


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe"]
)
def test_every_mixture_has_a_router_for_each_block_of_experts(family):
    model = build(family)
    tokens = tokens_for(model)
    statistics = fasc.collect(model, corpus=tokens, sequences=len(tokens), sequence_length=tokens.shape[1])
    assert routers(model) == [], "experts are fused"
    small = fasc.compress(model, statistics, param_fraction=0.7, overhead=0, rank_multiple=1, damping=1e-2).model
    holders = {name.partition(".experts.")[0] for name, _ in small.named_modules() if ".experts.0" in name}
    assert {name.rpartition(".")[0] for name in routers(small)} == holders != set()
    assert len(routers(small)) == len(holders)
