"""Sketches of sequences that are given whole."""

import torch

from fasc.model.groups import InputGroup
from fasc.model.layers import Layer
from fasc.statistics.extras import SequenceSketches


def sketches_of(x, g, sequences):
    """Of inputs and input gradients [tokens, d] that are cut into so many sequences of one length, one batch each."""
    group = InputGroup((Layer("a", x.shape[1], x.shape[1], bias=False),))
    extra = SequenceSketches(group, torch.device("cpu"))
    length = len(x) // sequences
    extra.add(x, {"a": (g, g)}, [length] * sequences)
    return extra.publish(len(x), sequences)
