"""The tensors of a model as other programs name and shape them: every layer one matrix, with a bias or without."""

from collections.abc import Iterator

from torch import Tensor
from transformers import PreTrainedModel

from fasc.errors import UsageError
from fasc.layouts._replacement import Replacement
from fasc.layouts.merged import MergedLinear


def ordinary_tensors(model: PreTrainedModel, engine: str) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything that is stored, merged layers under the dense layers' names; tied weights once.

    Args:
        model: dense, merged, or with fewer channels.
        engine: who is to read them, for the message.

    Raises:
        UsageError: a layer is stored as factors.
    """
    replaced = {name: module for name, module in model.named_modules() if isinstance(module, Replacement)}
    for name, module in replaced.items():
        if not isinstance(module, MergedLinear):
            raise UsageError(
                f"`{name}` is stored as factors, which {engine} cannot hold", f"compress with `--for {engine}`, or with `--merge`"
            )
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    for name, tensor in model.state_dict().items():
        owner, _, key = name.rpartition(".")
        if owner.removesuffix(".whole") in replaced:
            if owner.endswith(".whole"):
                yield f"{owner.removesuffix('.whole')}.{key}", tensor.detach()
        elif not (name in tied and model.config.tie_word_embeddings):
            yield name, tensor.detach()
