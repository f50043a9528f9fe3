"""What every registered layout owes: its modules compute up·down x + bias, weigh what it says, and are ordinary."""

import copy
import json
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from fasc.layouts import LAYOUTS
from tests.layouts.units import FACTORED, RANKS, SHAPES, empty, factors_of, rank_of, stored, unit_of

pytestmark = pytest.mark.parametrize("name", FACTORED)

INPUTS = [(), (1,), (5,), (1, 1), (2, 3), (40,), (0,)]
"""Shapes of an input before its last axis: from one vector to many, and none."""


@pytest.fixture(params=[pytest.param((shape, rank), id=f"{shape}, rank {rank}") for shape in SHAPES for rank in RANKS])
def case(request, name):
    return stored(name, *request.param)


@pytest.fixture(params=["one layer", "three layers"])
def usual(request, name):
    """A unit of one and of several layers, where the shape does not matter otherwise."""
    return stored(name, request.param, 4)


def close(given, expected):
    torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("training", [True, False], ids=["with gradients", "without"])
def test_the_modules_compute_the_product_and_the_bias(case, training):
    with torch.set_grad_enabled(training):
        for shape in INPUTS:
            x = case.inputs(*shape)
            before = x.clone()
            for module, expected in zip(case.modules, case.outputs(x), strict=True):
                close(module(x), expected)
            assert torch.equal(x, before), "the input stays as it is"
            scattered = x[..., None].expand(*x.shape, 2)[..., 0]
            close(case.modules[0](scattered), case.outputs(x)[0])


def test_the_dense_form_is_the_product_and_the_bias(case):
    for module, weight, bias in zip(case.modules, case.weights, case.biases, strict=True):
        given = case.layout.dense(module)
        close(given[0], weight)
        close(given[1], bias)


def test_it_weighs_what_it_says(case):
    tensors = list(case.modules.state_dict().values())
    indices = sum(tensor.numel() for tensor in tensors if not tensor.is_floating_point())
    assert case.layout.indices(case.unit, case.rank) == indices
    assert case.layout.parameters(case.unit, case.rank) == sum(tensor.numel() for tensor in tensors)
    for dtype in (torch.float32, torch.bfloat16):
        stored_bytes = sum(tensor.numel() * tensor.element_size() for tensor in case.modules.to(dtype).state_dict().values())
        assert case.layout.bytes(case.unit, case.rank, dtype.itemsize) == stored_bytes


def test_it_multiplies_as_often_as_it_says(case):
    assert case.layout.multiply_adds(case.unit, case.rank) == sum(linear.weight.numel() for linear in case.linears())
    products = len(case.linears()) - len(case.unit.layers)
    assert products <= case.layout.extra_products
    if case.rank < min(layer.d_out for layer in case.unit.layers):  # a layer whose rows are all pivots has one product less
        assert products == case.layout.extra_products


def test_every_parameter_lies_in_an_ordinary_linear_layer(case):
    """Tools that know nn.Linear (LoRA, quantisers) then change every weight, and none in a way that is not meant."""
    inside = {id(p) for linear in case.linears() for p in (linear.weight, linear.bias)}
    assert {id(parameter) for parameter in case.modules.parameters()} <= inside
    for linear in case.linears():
        assert type(linear) is nn.Linear, "some tools look for the very class"
        assert tuple(linear.weight.shape) == (linear.out_features, linear.in_features)
    for module, layer in zip(case.modules, case.unit.layers, strict=True):
        assert (module.in_features, module.out_features) == (layer.d_in, layer.d_out)


def test_the_projection_of_several_layers_is_computed_once_and_nothing_is_kept(usual):
    """Without gradients; every tensor that a forward pass leaves behind would be memory of the user's."""
    usual.modules.requires_grad_(False)
    products = []
    real = F.linear

    def watched(x, weight, bias=None):
        products.append(weight)
        return real(x, weight, bias)

    x = usual.inputs(3)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", watched)
        for module in usual.modules:
            module(x)
    assert len(products) == len({id(weight) for weight in products}) == len(usual.linears())
    left = weakref.ref(x)
    del x
    assert left() is None


def test_the_layers_of_a_unit_may_be_called_in_any_order_on_any_input(usual):
    usual.modules.requires_grad_(False)
    a, b = usual.inputs(7), usual.inputs(7).flip(0)
    last = len(usual.modules) - 1
    for index, x in [(0, a), (0, b), (last, a), (last, b), (0, a), (last, a), (last, a), (0, b), (last, b)]:
        close(usual.modules[index](x), usual.outputs(x)[index])


def test_an_input_that_was_changed_in_place_is_read_again(usual):
    """Whoever keeps one buffer for all inputs calls with the same tensor, whether a pass was finished or not."""
    usual.modules.requires_grad_(False)
    x = usual.inputs(4)
    for module in (*usual.modules, usual.modules[0]):
        module(x)
    x.mul_(2)
    for module, expected in zip(usual.modules, usual.outputs(x), strict=True):
        close(module(x), expected)


def test_inference_mode_computes_the_same(usual):
    with torch.inference_mode():
        x = usual.inputs(4)
        for module, expected in zip(usual.modules, usual.outputs(x), strict=True):
            close(module(x), expected)


def test_training_sees_its_own_updates_at_once(usual):
    x = usual.inputs(4)
    usual.modules[0](x)
    with torch.no_grad():
        for linear in usual.linears():
            linear.weight.mul_(2)
    for module in usual.modules:
        weight, bias = usual.layout.dense(module)
        close(module(x), x @ weight.mT + bias)


def test_gradients_flow_to_the_input_and_to_every_parameter(usual):
    names, parameters = zip(*usual.modules.named_parameters(), strict=True)
    x = usual.inputs(2).requires_grad_(True)

    def outputs(x, *values):
        class Whole(nn.Module):
            def __init__(self):
                super().__init__()
                self.modules_ = usual.modules

            def forward(self, x):
                return torch.cat([module(x) for module in self.modules_], dim=-1)

        return torch.func.functional_call(
            Whole(), {f"modules_.{name}": value for name, value in zip(names, values, strict=True)}, (x,)
        )

    values = [parameter.detach().clone().requires_grad_(True) for parameter in parameters]
    assert torch.autograd.gradcheck(outputs, (x, *values))
    outputs(x, *values).square().sum().backward()
    assert all(value.grad is not None and value.grad.abs().max() > 0 for value in values)


def test_a_gradient_of_the_input_alone_passes_through_frozen_layers(usual):
    usual.modules.requires_grad_(False)
    x = usual.inputs(3).requires_grad_(True)
    sum(module(x).sum() for module in usual.modules).backward()
    expected = sum(weight.sum(0) for weight in usual.weights).expand_as(x)
    close(x.grad, expected)


def test_copies_share_nothing_and_compute_the_same(usual):
    twin = copy.deepcopy(usual.modules)
    x = usual.inputs(3)
    for module, expected in zip(twin, usual.outputs(x), strict=True):
        close(module(x), expected)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    for module, expected in zip(usual.modules, usual.outputs(x), strict=True):
        close(module(x), expected)
    places = [{t.data_ptr() for t in modules.state_dict().values() if t.numel()} for modules in (twin, usual.modules)]
    assert not places[0] & places[1]


def test_hooks_of_every_linear_layer_are_called(usual):
    """Offloading and tracing hang on them."""
    called = set()
    for linear in usual.linears():
        linear.register_forward_hook(lambda module, *_: called.add(module))
    for module in usual.modules:
        module(usual.inputs(3))
    assert called == set(usual.linears())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamic_quantisation_changes_every_linear_layer(usual):
    with torch.no_grad():
        modules = torch.ao.quantization.quantize_dynamic(copy.deepcopy(usual.modules).float(), {nn.Linear}, dtype=torch.qint8)
        assert not _linears(modules)
        x = usual.inputs(6)
        for module, expected in zip(modules, usual.outputs(x), strict=True):
            assert float((module(x.float()) - expected).norm() / expected.norm()) < 0.1


class Tripled(nn.Module):
    """What LoRA and quantisers do: a module in the place of a linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.in_features, self.out_features = inner, inner.in_features, inner.out_features

    def forward(self, x):
        return 3 * self.inner(x)


def test_what_stands_in_the_place_of_a_linear_layer_is_called(usual):
    expected = copy.deepcopy(usual.modules)
    places = [
        (parent, key) for parent in usual.modules.modules() for key, child in parent.named_children() if type(child) is nn.Linear
    ]
    for parent, key in places:
        setattr(parent, key, Tripled(getattr(parent, key)))
    with torch.no_grad():
        for parameter in [one for child in _linears(expected) for one in child.parameters()]:
            parameter.mul_(3)
        x = usual.inputs(3)
        for module, other in zip(usual.modules, expected, strict=True):
            close(module(x), other(x))


def test_weights_that_a_parametrization_keeps_elsewhere_are_read(usual):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    expected = copy.deepcopy(usual.modules)
    for number, (linear, plain) in enumerate(zip(usual.linears(), _linears(expected), strict=True)):
        if number % 2 == 0:
            plain.weight.data.mul_(2)
            parametrize.register_parametrization(linear, "weight", Doubled())
    x = usual.inputs(3)
    for module, plain in zip(usual.modules, expected, strict=True):
        close(module(x), plain(x))


def _linears(modules):
    return [module for module in modules.modules() if isinstance(module, nn.Linear)]


def test_half_precision_is_as_good_as_half_precision(usual):
    x = usual.inputs(6)
    for dtype, error in ((torch.bfloat16, 0.05), (torch.float16, 0.02)):
        modules = copy.deepcopy(usual.modules).to(dtype)
        for module, expected in zip(modules, usual.outputs(x), strict=True):
            given = module(x.to(dtype)).detach()
            assert given.dtype == dtype
            assert float((given.double() - expected).norm() / expected.norm()) < error


def test_autocast_casts_the_products(usual):
    x = usual.inputs(6).float()
    modules = copy.deepcopy(usual.modules).float()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [module(x).detach() for module in modules]
    for given, expected in zip(outputs, usual.outputs(x.double()), strict=True):
        assert given.dtype == torch.bfloat16
        assert float((given.double() - expected).norm() / expected.norm()) < 0.05


def test_encoding_twice_gives_the_same_bits(usual):
    again = stored(usual.layout.name, "one layer" if len(usual.unit.layers) == 1 else "three layers", 4)
    for one, other in zip(usual.states, again.states, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert again.facts == usual.facts


def test_its_facts_are_plain_json(case):
    assert json.loads(json.dumps(case.facts)) == case.facts


def test_low_precision_does_not_meet_large_coefficients(usual):
    """What is stored beside the weights' own rows and columns stays of a size that bfloat16 can carry."""
    scale = max(
        float(weight.abs().max())
        for weight in (*usual.weights, *usual.states[0].values())
        if weight.is_floating_point() and weight.numel()
    )
    for state in usual.states:
        for tensor in state.values():
            if tensor.is_floating_point() and tensor.numel():  # the mark is empty
                assert float(tensor.abs().max()) <= 10 * scale


@pytest.mark.parametrize("shape", SHAPES)
def test_every_rank_that_planning_may_choose_can_be_stored(name, shape):
    layout, unit = LAYOUTS[name], unit_of(shape)
    for step in (1, 2):
        for rank in layout.suited(unit).ranks(unit, step):
            assert rank % step == 0
            factors, bias, inputs = factors_of(unit, rank)
            encoded = layout.encode(unit, factors, bias, inputs)
            layout.check(unit, rank, encoded.facts)
            modules = empty(layout, unit, rank, encoded.facts)
            for module, state in zip(modules, encoded.states, strict=True):
                module.load_state_dict(state)


def test_more_rank_costs_more_or_the_same(name):
    for shape in SHAPES:
        unit = unit_of(shape)
        layout = LAYOUTS[name]
        ranks = range(1, rank_of(unit, "largest") + 1)
        for cost in (layout.parameters, layout.multiply_adds):
            costs = [cost(unit, rank) for rank in ranks]
            assert all(one > 0 for one in costs)
            assert costs == sorted(costs)


@pytest.mark.parametrize("shape", ["one layer", "three layers"])
def test_the_form_for_a_unit_is_a_registered_layout_of_the_same_cost(name, shape):
    unit = unit_of(shape)
    form = LAYOUTS[name].suited(unit)
    assert LAYOUTS[form.name] is form
    assert form.parameters(unit, 4) == LAYOUTS[name].parameters(unit, 4)
    assert form.suited(unit) is form


def test_it_says_what_it_is(name):
    layout = LAYOUTS[name]
    assert layout.name == name
    assert (type(layout).__doc__ or "").strip().endswith(".")
    assert not layout.leaves_dense
