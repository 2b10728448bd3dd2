"""The language-model head on the answers' positions alone, with its gradient formed in the forward pass."""

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from gang.lora import product

ROWS = 1024  # positions whose logits exist at a time: 1024 × 150,000 words in float32 are 0.6 GB


class Head:
    """A model's own head: logits = cap · tanh(scale · (hidden Wᵀ + bias) / cap), with what it has of these."""

    def __init__(self, model: PreTrainedModel):
        layer, config = model.get_output_embeddings(), model.config.get_text_config()
        self.weight, self.bias = layer.weight, getattr(layer, "bias", None)
        self.scale, self.cap = logit_scale(config), getattr(config, "final_logit_softcapping", None)

    def logits(self, hidden: Tensor) -> tuple[Tensor, Tensor | float]:
        """For hidden [P, d] the logits [P, V] in float32, and their derivative by what the matrix gives."""
        logits = product(hidden.to(self.weight.dtype), self.weight)
        logits = (logits if self.bias is None else logits.add_(self.bias)).float()
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.cap is None:
            return logits, self.scale
        slope = logits.div_(self.cap).tanh_().square().neg_().add_(1).mul_(self.scale)
        return logits.mul_(self.cap), slope


def logit_scale(config: PreTrainedConfig) -> float:
    """What a model multiplies its logits by; the architectures call it by different names."""
    for key in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(config, key, None)) is not None:
            return scale
    scaling = getattr(config, "logits_scaling", None) or 1.0
    return scaling if config.model_type == "hyperclovax" else 1 / scaling


class AnswerLoss(torch.autograd.Function):
    """Σ share · NLL, and per position what train.py logs.

    hidden [P, d], a head, targets [P], share [P] (what a position's NLL counts in the loss) to the scalar
    loss, and [P, 3]: NLL in nats, entropy in nats, 1 where the target is the most likely token. Since the shares are
    known beforehand, ∂loss/∂hidden is made while the logits are there; nothing is recomputed. A position of share 0 is
    a filler: whatever its hidden state holds, it adds exactly 0 to the loss and gets a gradient of exactly 0.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Head, targets: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
        scores = torch.empty(len(hidden), 3, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), ROWS):
            part = slice(start, start + ROWS)
            target = targets[part, None]
            logits, slope = head.logits(hidden[part])
            total = logits.logsumexp(-1, keepdim=True)
            right = logits.argmax(-1, keepdim=True) == target
            nll = total - logits.gather(-1, target)
            likelihood = (logits - total).exp_()
            entropy = total - logits.mul_(likelihood).sum(-1, keepdim=True)
            scores[part] = torch.cat([nll, entropy, right], -1)
            if gradient is not None:
                error = likelihood.scatter_add_(-1, target, -torch.ones_like(nll)).mul_(share[part, None] * slope)
                whole = product(error.to(head.weight.dtype), head.weight.mT)
                gradient[part] = torch.where(share[part, None] == 0, 0.0, whole)  # NaN times 0 would be NaN
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(scores)
        return torch.where(share == 0, 0.0, scores[:, 0] * share).sum(), scores

    @staticmethod
    def backward(ctx, scale: Tensor, _):
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None, None
