"""The adapters of N members as the rows of one matrix [N, P], with their gradients and AdamW's two moments alike."""

import math

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import TrainingArguments

from gang.lora import StackedLoRA

BLOCK = 1024  # numbers whose squares are summed at a time: one float32 sum over all of them is 5e-6 too small


class Stack:
    """Windows of PEFT's own layers on one matrix, and the update of all members in a few operations on it.

    `members` holds, per member, PEFT's LoRA layers by module name, freshly initialised: their weights move into the
    matrix and become windows on it, so that whatever reads a PEFT layer (measurements, export) reads the member.
    """

    def __init__(self, members: list[dict[str, LoraLayer]], stacked: dict[str, StackedLoRA], training):
        self.members, self.stacked = members, stacked
        self.training: TrainingArguments = training
        self.rank = max(layer.r["default"] for layers in members for layer in layers.values())
        like = next(iter(members[0].values())).lora_A["default"].weight
        width = sum(self.rank * (layer.in_features + layer.out_features) for layer in members[0].values())
        width = math.ceil(width / BLOCK) * BLOCK
        self.values = torch.zeros(len(members), width, dtype=like.dtype, device=like.device)
        self.gradients, self.first, self.second = (torch.zeros_like(self.values) for _ in range(3))
        # In double precision: 1 - 0.999² loses five digits in float32, and every step after it would be off by 1e-5.
        self.updates = torch.zeros((), dtype=torch.float64, device=like.device)
        self.point(copy=True)
        self.round()

    def round(self) -> None:
        if self.training.adapter_dtype == "bfloat16_weights":
            self.values.copy_(self.values.bfloat16())

    def windows(self, matrix: Tensor):
        """Per module its name and its A [N, r, in] and B [N, out, r] within the matrix."""
        start = 0
        for name, layer in self.members[0].items():
            middle = start + self.rank * layer.in_features
            end = middle + self.rank * layer.out_features
            a = matrix[:, start:middle].unflatten(1, (self.rank, layer.in_features))
            yield name, a, matrix[:, middle:end].unflatten(1, (layer.out_features, self.rank))
            start = end

    def point(self, copy: bool = False) -> None:
        """Let the stacked layers and PEFT's own look at the matrix; `copy` PEFT's initial weights into it first."""
        for (name, a, b), (_, a_gradient, b_gradient) in zip(
            self.windows(self.values), self.windows(self.gradients), strict=True
        ):
            layer = self.stacked[name]
            layer.a, layer.b, layer.a_gradient, layer.b_gradient = a, b, a_gradient, b_gradient
            layer.freeze_a = self.training.freeze_a
            layers = [member[name] for member in self.members]
            layer.scaling = torch.tensor([x.scaling["default"] for x in layers], device=a.device)[:, None, None]
            for index, peft in enumerate(layers):
                rank = peft.r["default"]
                for window, weight in (
                    (a[index, :rank], peft.lora_A["default"].weight),
                    (b[index, :, :rank], peft.lora_B["default"].weight),
                ):
                    if copy:
                        window.copy_(weight.data)
                    weight.data = window

    def drop(self, index: int) -> None:
        """Take a member out: PEFT's layers keep its weights, the other rows move together."""
        for layer in self.members.pop(index).values():
            for part in (layer.lora_A["default"], layer.lora_B["default"]):
                part.weight.data = part.weight.data.clone(memory_format=torch.contiguous_format)
        left = [i for i in range(len(self.values)) if i != index]
        self.values, self.gradients, self.first, self.second = (
            matrix[left] for matrix in (self.values, self.gradients, self.first, self.second)
        )
        if left:
            self.point()

    @torch.no_grad()
    def update(self, rates: Tensor) -> Tensor:
        """Clip each member's gradient by its own norm and take one AdamW step at its own rate [N]; returns the norms.

        The arithmetic of torch.optim.AdamW, in its order; no branch depends on a value, so a CUDA graph can hold it.
        """
        options = self.training
        norms = self.gradients.float().unflatten(1, (-1, BLOCK)).norm(dim=2).norm(dim=1)
        if options.max_grad_norm > 0:
            self.gradients.mul_((options.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
        self.updates += 1
        rates = rates[:, None].to(self.values.dtype)
        beta1, beta2 = options.adam_beta1, options.adam_beta2
        if options.weight_decay:
            self.values.mul_(1 - rates * options.weight_decay)
        self.first.lerp_(self.gradients, 1 - beta1)
        self.second.mul_(beta2).addcmul_(self.gradients, self.gradients, value=1 - beta2)
        scale = self.second.sqrt().div_((1 - beta2**self.updates).sqrt()).add_(options.adam_epsilon)
        self.values.sub_(self.first / scale * (rates / (1 - beta1**self.updates)))
        self.round()
        self.gradients.zero_()
        return norms
