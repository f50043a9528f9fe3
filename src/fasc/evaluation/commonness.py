"""How common a name is, as far as a model has read it."""

from collections.abc import Sequence

from fasc.evaluation.choices import score_continuations
from fasc.evaluation.registry import Subject
from fasc.model.load import LoadedModel
from fasc.model.scopes import evaluating


def commonness(loaded: LoadedModel, names: Sequence[str], what: str, batch_tokens: int) -> list[float]:
    """Log-probability of each name at the beginning of a text, nats: the logarithm of how often the model expects to read it.

    A stand-in for counts of page views, which no data set here has. Long names are rarer, as in text.

    Args:
        loaded: the model, and its tokenizer.
        names: such as subjects of facts.
        what: for the progress bar.
        batch_tokens: tokens per forward pass.
    """
    distinct = list(dict.fromkeys(names))
    pairs = [("", name) for name in distinct]
    with evaluating(loaded.model):
        scored = score_continuations(
            Subject(*loaded, None), pairs, ["names"] * len(pairs), f"{what}: how common the subjects are", batch_tokens
        )
    known = dict(zip(distinct, scored, strict=True))
    return [known[name].log_probability for name in names]
