"""One edit of each kind for the tiny llama, as a plan writes them and as compression has made them."""

from fasc.edits.attention import Heads, Values
from fasc.edits.factor import Factor
from fasc.edits.mask import Mask
from fasc.edits.narrow import Narrow, Shape
from fasc.edits.quantise import Quantise
from fasc.edits.remove import Remove
from fasc.edits.skip import Skip
from fasc.edits.unfuse import Holder, Unfuse
from fasc.edits.vocabulary import VocabularyBits

BLOCK = "model.layers.0"
ATTENTION = tuple(f"{BLOCK}.self_attn.{name}_proj" for name in "qkv")
MLP = tuple(Shape(f"{BLOCK}.mlp.{name}_proj", 32, 48, False) for name in ("gate", "up"))
DOWN = Shape(f"{BLOCK}.mlp.down_proj", 48, 32, False)

QKV = tuple(Shape(name, 32, d_out, False) for name, d_out in zip(ATTENTION, (32, 16, 16), strict=True))
OUT = Shape(f"{BLOCK}.self_attn.o_proj", 32, 32, False)

KINDS = {
    "factor": Factor(
        group=f"{BLOCK}.self_attn.q_proj+k_proj+v_proj",
        layers=ATTENTION,
        d_in=32,
        d_outs=(32, 16, 16),
        biases=(False, False, False),
        rank=6,
        layout="pivoted",
        method="fasc",
        options={"damping": 0.01},
    ),
    "narrow": Narrow(producers=MLP, consumer=DOWN, channels=48, width=20, damping=0.01),
    "heads": Heads(producers=QKV, consumer=OUT, heads=2, count=1, damping=0.01),
    "values": Values(producers=QKV[2:], consumer=OUT, heads=2, width=8, size=5, damping=0.01),
    "skip": Skip(sublayer=f"{BLOCK}.mlp", kind="mlp", layers=(*MLP, DOWN), returns=0, others=0),
    "vocabulary": VocabularyBits(
        end="both", embedding="model.embed_tokens", head="lm_head", tokens=128, width=32, bits=4, group_size=16
    ),
    "mask": Mask(group=DOWN.name, layer=DOWN.name, d_in=48, d_out=32, bias=False, weights=600, method="magnitude"),
    "quantise": Quantise(
        group=f"{BLOCK}.self_attn.q_proj+k_proj+v_proj",
        layers=ATTENTION,
        maps=((32, 32), (32, 16), (32, 16)),
        bits=4,
        group_size=16,
    ),
    "remove": Remove(part="channels", parts=48, count=20, producers=MLP, consumer=DOWN, method="llm-pruner"),
}

MADE = [
    KINDS["factor"].model_copy(update={"facts": {"pivots": [4, 1, 1]}, "notes": {"bound": 1.5}, "predicted_loss": 0.125}),
    KINDS["factor"].model_copy(
        update={"layers": ATTENTION[:1], "d_outs": (32,), "biases": (True,), "facts": {}, "selection": {"rho": 0.2}}
    ),
]

UNFUSE = Unfuse(
    holders=(Holder(name=f"{BLOCK}.mlp.experts", experts=4, first="gate_up_proj", d_in=32, d_first=96, channels=48, bias=False),)
)
"""Of a mixture; its own tests are beside those of experts."""
