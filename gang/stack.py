"""The adapters of N members as the rows of one matrix [N, P], with their gradients and AdamW's two moments alike."""

import math
from collections.abc import Iterator

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import TrainingArguments

from gang.lora import StackedLoRA

BLOCK = 1024  # numbers whose squares are summed at a time: one float32 sum over all of them is 5e-6 too small


class Stack:
    """What `layers` multiply by: windows on one matrix, and the update of all members in a few operations on it.

    `members` holds, per member, PEFT's LoRA layers by module name; their weights are copied, and `export` gives them
    back. A member of lower rank than the highest has zeros in the rest, whose gradients are exactly zero.
    """

    def __init__(self, members: list[dict[str, LoraLayer]], layers: dict[str, StackedLoRA], training):
        self.layers = layers
        self.training: TrainingArguments = training
        self.ranks = [{name: layer.r["default"] for name, layer in member.items()} for member in members]
        self.scaling = torch.tensor([[layer.scaling["default"] for layer in member.values()] for member in members])
        self.rank = max(max(ranks.values()) for ranks in self.ranks)
        like = next(iter(members[0].values())).lora_A["default"].weight
        self.scaling = self.scaling.to(like.device)
        width = sum(self.rank * (layer.in_features + layer.out_features) for layer in members[0].values())
        width = math.ceil(width / BLOCK) * BLOCK
        self.sizes = {name: (layer.in_features, layer.out_features) for name, layer in members[0].items()}
        self.values = torch.zeros(len(members), width, dtype=like.dtype, device=like.device)
        self.gradients, self.first, self.second = (torch.zeros_like(self.values) for _ in range(3))
        # In double precision: 1 - 0.999² loses five digits in float32, and every step after it would be off by 1e-5.
        self.updates = torch.zeros((), dtype=torch.float64, device=like.device)
        self.point()
        for index, member in enumerate(members):
            for window, weight in self.pairs(index, member):
                window.copy_(weight)
        self.round()

    def state(self) -> list[Tensor]:
        """The tensors that a step changes."""
        return [self.values, self.gradients, self.first, self.second, self.updates]

    def windows(self, matrix: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Per module its name and its A [N, r, in] and B [N, out, r] within the matrix."""
        start = 0
        for name, (d_in, d_out) in self.sizes.items():
            middle, end = start + self.rank * d_in, start + self.rank * (d_in + d_out)
            a = matrix[:, start:middle].unflatten(1, (self.rank, d_in))
            yield name, a, matrix[:, middle:end].unflatten(1, (d_out, self.rank))
            start = end

    def point(self) -> None:
        """Let the layers look at the matrix. Graphs hold its addresses: whoever calls this must capture them anew."""
        both = zip(self.windows(self.values), self.windows(self.gradients), self.scaling.T.contiguous(), strict=True)
        for (name, a, b), (_, a_gradient, b_gradient), scaling in both:
            layer = self.layers[name]
            layer.a, layer.b, layer.a_gradient, layer.b_gradient = a, b, a_gradient, b_gradient
            layer.scaling = scaling[:, None, None]
            layer.freeze_a = self.training.freeze_a

    def pairs(self, index: int, member: dict[str, LoraLayer]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each matrix of a member here, and in PEFT's layer."""
        for name, a, b in self.windows(self.values):
            rank, layer = self.ranks[index][name], member[name]
            yield a[index, :rank], layer.lora_A["default"].weight.data
            yield b[index, :, :rank], layer.lora_B["default"].weight.data

    def export(self, index: int, member: dict[str, LoraLayer]) -> None:
        """Copy a member's weights into PEFT's layers."""
        for window, weight in self.pairs(index, member):
            weight.copy_(window)

    def keep(self, left: list[int]) -> None:
        """Leave only these rows, in this order."""
        self.values, self.gradients, self.first, self.second = (
            matrix[left] for matrix in (self.values, self.gradients, self.first, self.second)
        )
        self.scaling, self.ranks = self.scaling[left], [self.ranks[index] for index in left]
        self.point()

    def round(self) -> None:
        if self.training.adapter_dtype == "bfloat16_weights":
            self.values.copy_(self.values.bfloat16())

    def update(self, rates: Tensor) -> Tensor:
        """Clip each member's gradient by its own norm and take one AdamW step at its own rate [N]; returns the norms.

        The arithmetic of torch.optim.AdamW, in its order; no branch depends on a value, so a CUDA graph can hold it.
        """
        options = self.training
        matrices = self.values, self.gradients, self.first, self.second
        # Adapters in bfloat16 are rounded once, at the end, as the fused AdamW does; float32 is updated in its place.
        values, gradients, first, second = (matrix.float() for matrix in matrices)
        norms = gradients.unflatten(1, (-1, BLOCK)).norm(dim=2).norm(dim=1)
        if options.max_grad_norm > 0:
            gradients.mul_((options.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
        self.updates += 1
        rates = rates[:, None]
        beta1, beta2 = options.adam_beta1, options.adam_beta2
        if options.weight_decay:
            values.mul_(1 - rates * options.weight_decay)
        first.lerp_(gradients, 1 - beta1)
        second.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        scale = second.sqrt().div_((1 - beta2**self.updates).sqrt()).add_(options.adam_epsilon)
        values.sub_(first / scale * (rates / (1 - beta1**self.updates)))
        for matrix, result in zip(matrices, (values, gradients, first, second), strict=True):
            matrix.copy_(result)
        self.round()
        self.gradients.zero_()
        return norms

    def grams(self) -> Tensor:
        """[N, modules, 2, r, r]: train.adapter_grams of each member."""
        pairs = [torch.stack([a @ a.mT, b.mT @ b], 1) for _, a, b in self.windows(self.values.float())]
        return torch.stack(pairs, 1) * self.scaling[:, :, None, None, None]
