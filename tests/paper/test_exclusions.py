"""The groups that the paper leaves out of its scores."""

from fasc.paper.exclusions import excluded


def rows(blocks=6):
    return [
        {"group": f"model.layers.{b}.{name}", "block": b, "layers": layers, "gradient_norm": norm}
        for b in range(blocks)
        for name, layers, norm in (("self_attn.q+k", ["q", "k"], 1.0), ("mlp.down", ["d"], 1e-6 if b == 3 else 1.0))
    ]


def test_exclusions_are_those_of_the_paper():
    reasons = {row["group"]: reason for row, reason in zip(rows(), excluded(rows()), strict=True) if reason}
    early = "attention of blocks 0-2"
    assert reasons == {
        "model.layers.0.self_attn.q+k": early,
        "model.layers.1.self_attn.q+k": early,
        "model.layers.2.self_attn.q+k": early,
        "model.layers.3.mlp.down": "near-constant gradients",
        "model.layers.5.mlp.down": "output projection of the last block",
    }


def test_exclusions_are_free_of_scale():
    scaled = [row | {"gradient_norm": 1e9 * row["gradient_norm"]} for row in rows()]
    assert excluded(scaled) == excluded(rows())


def test_rows_without_gradients_are_excluded_by_their_place_alone():
    bare = [row | {"gradient_norm": None} for row in rows()]
    assert sum(reason is not None for reason in excluded(bare)) == 4
