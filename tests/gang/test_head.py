"""gang/head.py against PyTorch's own cross entropy."""

import math

import pytest
import torch

from gang.head import AnswerLoss


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_a_filler_holds_reaches_neither_loss_nor_gradient(value):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(5, 8), torch.randn(11, 8), torch.randint(11, (5,))
    share = torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0])
    filled = hidden.masked_fill((share == 0)[:, None], value).requires_grad_()
    loss, _ = AnswerLoss.apply(filled, weight, targets, share)
    loss.backward()
    hidden.requires_grad_()
    expected = (torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none") * share).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(filled.grad, hidden.grad)
