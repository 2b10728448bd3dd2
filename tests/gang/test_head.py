"""gang/head.py against PyTorch's own cross entropy."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from gang.head import AnswerLoss, Head
from gang.lora import onednn, product


class Model:
    """What a head reads of one: 11 words, 8 columns."""

    def __init__(self, bias: bool = False, scale: float | None = None, cap: float | None = None):
        torch.manual_seed(0)
        self.head = torch.nn.Linear(8, 11, bias=bias).requires_grad_(False)
        self.config = Gemma2Config(final_logit_softcapping=cap)
        self.config.logit_scale = scale

    def get_output_embeddings(self):
        return self.head


TARGETS, SHARE = torch.tensor([3, 0, 10, 7, 3]), torch.tensor([0.25, 0.0, 0.5, 0.25, 0.0])


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "kind", [{}, {"bias": True}, {"cap": 1.5}, {"scale": 0.5}, {"bias": True, "scale": 2.0, "cap": 2.0}]
)
def test_loss_and_gradient_whatever_a_filler_holds(kind, value, monkeypatch):
    monkeypatch.setattr("gang.head.ROWS", 2)  # five positions are three parts
    model = Model(**kind)
    hidden = torch.randn(5, 8)
    filled = hidden.masked_fill((SHARE == 0)[:, None], value).requires_grad_()
    loss, scores = AnswerLoss.apply(filled, Head(model), TARGETS, SHARE)
    (2 * loss).backward()
    logits = model.head(hidden.requires_grad_()) * kind.get("scale", 1)
    if cap := kind.get("cap"):
        logits = cap * torch.tanh(logits / cap)
    nll = torch.nn.functional.cross_entropy(logits, TARGETS, reduction="none")
    (2 * (nll * SHARE).sum()).backward()
    torch.testing.assert_close(loss, (nll * SHARE).sum())
    torch.testing.assert_close(filled.grad, hidden.grad)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    expected = torch.stack([nll, entropy, logits.argmax(-1) == TARGETS], -1)
    torch.testing.assert_close(scores[SHARE > 0], expected[SHARE > 0])


@pytest.mark.parametrize(
    ("config", "scale"),
    [(LlamaConfig(), 1.0), (CohereConfig(logit_scale=0.5), 0.5), (GraniteConfig(logits_scaling=8.0), 1 / 8),
     (SimpleNamespace(logits_scaling=8.0, model_type="hyperclovax"), 8.0),
     (SimpleNamespace(logits_scaling=8.0, model_type="other"), 1 / 8)],
)  # fmt: skip
def test_the_names_of_the_scale(config, scale):
    model = Model()
    model.config = SimpleNamespace(get_text_config=lambda: config)
    assert Head(model).scale == scale


def test_a_cpu_multiplies_float32_by_onednn_and_gets_what_pytorch_gives():
    assert onednn(torch.ones(1)) == torch.backends.mkldnn.is_available()
    assert not onednn(torch.ones(1, dtype=torch.bfloat16)) and not onednn(torch.ones(1, device="meta"))
    x, weight = torch.randn(3, 5, 8), torch.randn(4, 8)
    torch.testing.assert_close(product(x, weight), x @ weight.mT)
