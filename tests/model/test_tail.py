"""The tail of a model gives what the whole model gives."""

import torch

from fasc.model.blocks import block_names
from fasc.model.scopes import restored
from fasc.model.tail import TailRunner
from tests.conftest import tiny_model


def test_the_tail_gives_what_the_whole_model_gives(architecture, tokens):
    """Dense, and with the rows of a layer of the second block in another order."""
    model = tiny_model(architecture)
    names = block_names(model, [name for name, _ in model.named_modules()])
    runner = TailRunner(model, tokens, names)
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        assert torch.equal(runner.logits, expected)
        for name in names:
            torch.testing.assert_close(runner.logits_from(name), expected, rtol=0, atol=1e-4)
        block = model.get_submodule(names[1])
        layer = next(name for name, module in block.named_modules() if hasattr(module, "weight") and module.weight.dim() == 2)
        before = block.get_submodule(layer)
        with restored(model, [f"{names[1]}.{layer}"]):
            before.weight.copy_(before.weight.roll(1, 0))
            changed = model(input_ids=tokens, use_cache=False).logits
            assert not torch.allclose(changed, expected, rtol=0, atol=1e-3)
            torch.testing.assert_close(runner.logits_from(names[1]), changed, rtol=0, atol=1e-4)
            before.weight.copy_(before.weight.roll(-1, 0))
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected)


def test_blocks_below_do_not_run_and_run_again_afterwards(tokens):
    model = tiny_model()
    names = block_names(model, [name for name, _ in model.named_modules()])
    runner = TailRunner(model, tokens, names)
    ran = []
    for name in names:
        model.get_submodule(name).mlp.register_forward_hook(lambda *_, name=name: ran.append(name))
    runner.logits_from(names[1])
    assert ran == names[1:]
    assert all("forward" not in vars(model.get_submodule(name)) for name in names)
