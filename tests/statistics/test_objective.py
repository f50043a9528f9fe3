"""The measured scalar is a sum of token losses, on labels from the text or from the model."""

import pytest
import torch

from fasc.statistics.objective import summed_nll


def test_sampled_labels_follow_the_model_and_the_seed():
    logits = torch.log(torch.tensor([0.7, 0.2, 0.1])).expand(1, 4000, 3)
    tokens = torch.zeros(1, 4000, dtype=torch.long)
    loss = summed_nll(logits, tokens, None, "sampled", [0]) / 4000
    entropy = -(0.7 * torch.tensor(0.7).log() + 0.2 * torch.tensor(0.2).log() + 0.1 * torch.tensor(0.1).log())
    assert float(loss) == pytest.approx(float(entropy), rel=0.05)
    again = summed_nll(logits, tokens, None, "sampled", [0]) / 4000
    assert torch.equal(loss, again)
    assert not torch.equal(loss, summed_nll(logits, tokens, None, "sampled", [1]) / 4000)


def test_the_loss_is_a_sum_so_that_gradients_do_not_depend_on_the_batch():
    logits = torch.randn(6, 9, 5)
    tokens = torch.randint(5, (6, 9))
    whole = summed_nll(logits, tokens, None, "corpus")
    parts = sum(summed_nll(logits[i : i + 2], tokens[i : i + 2], None, "corpus") for i in (0, 2, 4))
    torch.testing.assert_close(whole, parts)
