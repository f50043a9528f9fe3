"""An edit fits the model as the edits before it have left it, or is refused in one line before anything is changed."""

import pytest
import torch

from fasc.compression.compress import carry_out
from fasc.edits._registry import layers_of
from fasc.edits.narrow import Shape
from fasc.edits.structure import check_edits
from fasc.errors import FascError, ModelError, StatisticsError
from fasc.methods import METHODS
from fasc.planning.options import MethodConfig
from fasc.planning.plan import ModelSize, Plan
from fasc.pruning import PRUNINGS
from fasc.statistics.collect import collect_moments
from fasc.statistics.vocabulary import VOCABULARY
from tests.conftest import tiny_model
from tests.edits.kinds import ATTENTION, DOWN, KINDS, MADE, MLP, OUT, QKV

STRANGER = "model.layers.7.mlp.up_proj"


@pytest.fixture(scope="module")
def statistics(tokens):
    needs = frozenset().union(METHODS["fasc"].needs_in(("group", "layer")), *(pruning.needs for pruning in PRUNINGS.values()))
    return collect_moments(tiny_model(), tokens, needs | {VOCABULARY})


def plan_of(*edits):
    model = tiny_model()
    return Plan(MethodConfig(), edits, tuple(layers_of(model).values()), ModelSize(parameters=1, bytes_per_parameter=4))


def refused(*edits, match):
    with pytest.raises(FascError, match=match) as problem:
        check_edits(edits, tiny_model())
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize("kind", KINDS)
def test_each_example_fits_and_can_be_made(kind, statistics):
    model = tiny_model()
    layers = layers_of(model)
    left = KINDS[kind].check(layers)
    assert layers == layers_of(tiny_model()), "checking changes nothing"
    assert all(left.get(name) != layers[name] for name in KINDS[kind].touches if name in layers)
    assert all(left[name] == layer for name, layer in layers.items() if name not in KINDS[kind].touches)
    if kind != "remove":  # which needs every block
        carry_out(model, statistics, plan_of(KINDS[kind]))
        now = layers_of(model)
        assert all(now[name] == layer for name, layer in left.items() if name not in ATTENTION)


FACTOR, NARROW, MASK, REMOVE = KINDS["factor"], KINDS["narrow"], KINDS["mask"], KINDS["remove"]
HEADS, VALUES, SKIP = KINDS["heads"], KINDS["values"], KINDS["skip"]


def but(edit, **changes):
    return edit.model_copy(update=changes)


IN_BLOCK_1 = but(
    FACTOR, group="model.layers.1.self_attn.q_proj+k_proj+v_proj", layers=tuple(name.replace(".0.", ".1.") for name in ATTENTION)
)


def renamed(shape, **changes):
    return shape._replace(**changes)


WRONG = {
    "rank 0": (but(FACTOR, rank=0), "cannot have rank 0"),
    "a rank below 0": (but(FACTOR, rank=-4), "cannot have rank -4"),
    "a rank above the width": (but(FACTOR, rank=65), "cannot have rank 65"),
    "an unknown layout": (but(FACTOR, layout="pivotal"), "unknown layout.*`pivotal`"),
    "a layout that is no layout of factors": (but(FACTOR, layout="dense"), "unknown layout of factors `dense`"),
    "another width": (but(FACTOR, d_outs=(32, 16, 8)), "is 16×32 here and 8×32 in the plan"),
    "another input": (but(FACTOR, d_in=48), "is 32×32 here and 32×48"),
    "a bias that is not there": (but(FACTOR, biases=(True, False, False)), "has no bias here and one in the plan"),
    "a layer twice": (but(FACTOR, layers=(ATTENTION[0], ATTENTION[1], ATTENTION[1])), "listed twice"),
    "a layer that is not there": (but(FACTOR, layers=(*ATTENTION[:2], STRANGER)), f"`{STRANGER}` is no linear layer"),
    "a module that is no linear layer": (but(FACTOR, layers=(*ATTENTION[:2], "model.norm")), "`model.norm` is no linear layer"),
    "facts of another rank": (but(MADE[0], rank=7), "pivots"),
    "facts without the pivots": (but(MADE[0], facts={}), "pivots"),
    "more channels than there are": (but(NARROW, width=49), "cannot keep 49 of 48 channels"),
    "all channels": (but(NARROW, width=48), "cannot keep 48 of 48 channels"),
    "another number of channels": (but(NARROW, channels=24), "cannot keep 20 of 24 channels"),
    "no producers": (but(NARROW, producers=()), "cannot keep 20 of 48 channels"),
    "a producer twice": (but(NARROW, producers=(MLP[0], MLP[0])), "listed twice"),
    "its own producer": (but(NARROW, producers=(*MLP, DOWN)), "listed twice"),
    "a narrow layer that is not there": (but(NARROW, consumer=renamed(DOWN, name=STRANGER)), "no linear layer"),
    "a narrow layer of another shape": (
        but(NARROW, producers=(renamed(MLP[0], d_out=96),)),
        "is 48×32 here and 96×32",
    ),
    "a producer that fits by no multiple": (but(NARROW, producers=(Shape(ATTENTION[0], 32, 32, False),)), "cannot keep"),
    "more weights than there are": (but(MASK, weights=48 * 32 + 1), "1,537 weights of 1,536"),
    "a mask of another shape": (but(MASK, d_in=32), "is 32×48 here and 32×32"),
    "a mask of a layer that is not there": (but(MASK, layer=STRANGER), "no linear layer"),
    "all heads": (but(HEADS, count=2), "cannot keep 2 of 2 key-value heads"),
    "heads that do not divide": (but(HEADS, heads=3, count=2), "cannot keep 2 of 3 key-value heads"),
    "no layers that make heads": (but(HEADS, producers=()), "cannot keep 1 of 2 key-value heads"),
    "heads of another shape": (but(HEADS, consumer=renamed(OUT, d_in=16)), "is 32×32 here and 32×16"),
    "all value features": (but(VALUES, size=8), "cannot keep 8 of 8 features"),
    "value heads of another width": (but(VALUES, width=16), "cannot keep 5 of 16 features"),
    "values of several layers": (but(VALUES, producers=QKV[1:]), "cannot keep 5 of 8 features"),
    "values of another module": (but(VALUES, producers=MLP[:1], heads=6), "cannot keep 5 of 8 features"),
    "a sublayer that is not there": (but(SKIP, sublayer="model.layers.7.mlp"), "differ in `model.layers.0.mlp.down_proj`"),
    "a sublayer with more layers": (but(SKIP, sublayer="model.layers.0"), "differ in `model.layers.0.self_attn.k_proj`"),
    "a sublayer with fewer layers": (but(SKIP, layers=(MLP[0], DOWN)), "differ in `model.layers.0.mlp.up_proj`"),
    "a sublayer of another shape": (but(SKIP, layers=(*MLP, renamed(DOWN, d_in=20))), "is 32×48 here and 32×20"),
    "a vocabulary in a block": (but(KINDS["vocabulary"], embedding=OUT.name), "lies in a block"),
    "more parts than there are": (but(REMOVE, count=49), "cannot keep 49 of 48"),
    "parts that do not divide": (but(REMOVE, parts=36), "cannot keep 20 of 36"),
    "a consumer twice": (but(REMOVE, producers=(*MLP, DOWN)), "listed twice"),
    "parts of a layer that is not there": (but(REMOVE, consumer=renamed(DOWN, name=STRANGER)), "no linear layer"),
}


@pytest.mark.parametrize("edit,message", WRONG.values(), ids=WRONG)
def test_an_edit_that_does_not_fit_is_refused_and_the_model_stays(edit, message, statistics):
    refused(edit, match=message)
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FascError, match=message):
        carry_out(model, statistics, plan_of(IN_BLOCK_1, edit))
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.parametrize("kind", ["factor", "mask", "remove", "skip"])
def test_what_was_replaced_is_not_edited_again(kind):
    refused(KINDS[kind], KINDS[kind], match="no linear layer of this model, or an earlier edit has replaced it")


def test_a_narrow_mlp_may_be_edited_further_in_the_shapes_it_has_left():
    narrow = {"layers": (MLP[0].name, MLP[1].name), "d_outs": (20, 20), "biases": (False, False)}
    factor = but(FACTOR, group="model.layers.0.mlp.gate_proj+up_proj", **narrow)
    check_edits([NARROW, factor], tiny_model())
    refused(NARROW, but(factor, d_outs=(48, 48)), match="is 20×32 here and 48×32")
    refused(factor, NARROW, match="is 48×32 here and 20×32")
    check_edits([NARROW, but(MASK, d_in=20, bias=True, weights=600)], tiny_model())
    refused(NARROW, but(MASK, d_in=20, weights=600), match="has a bias here and none in the plan")


def test_an_attention_may_lose_heads_and_then_value_features():
    left = {"consumer": renamed(OUT, d_in=16, bias=True), "heads": 1}
    narrow = but(VALUES, producers=(renamed(QKV[2], d_out=8),), **left)
    check_edits([HEADS, narrow], tiny_model())
    refused(HEADS, VALUES, match="is 8×32 here and 16×32")
    refused(HEADS, HEADS, match="is 16×32 here and 32×32")
    refused(SKIP, NARROW, match="an earlier edit has replaced it")


def test_a_rank_that_the_method_has_no_direction_for_is_refused(statistics):
    one = but(FACTOR, layers=ATTENTION[1:2], d_outs=(16,), biases=(False,), rank=20, layout="factors", method="two-sided")
    with pytest.raises(ModelError, match="16 directions and the plan keeps 20"):
        carry_out(tiny_model(), statistics, plan_of(one))


MISSING = {
    "no such group": (but(FACTOR, group="model.layers.9.self_attn"), "no group `model.layers.9.self_attn`"),
    "a group of other layers": (
        but(FACTOR, group="model.layers.1.self_attn.q_proj+k_proj+v_proj"),
        f"has no layer `{ATTENTION[0]}`",
    ),
    "no cross moment": (but(FACTOR, method="fasc-eq6"), "no cross covariance"),
    "a mask by another group": (but(MASK, group="model.layers.1.mlp.down_proj"), f"has no layer `{DOWN.name}`"),
}


@pytest.mark.parametrize("edit,message", MISSING.values(), ids=MISSING)
def test_an_edit_whose_moments_are_missing_is_refused_before_another_is_made(edit, message, statistics):
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(StatisticsError, match=message):
        carry_out(model, statistics, plan_of(IN_BLOCK_1, edit))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_edit_without_its_facts_builds_nothing():
    with pytest.raises(ModelError, match="lacks `facts`"):
        FACTOR.build(tiny_model())
