"""Parts of a model in fewer kernels: between the products, a GPU is busy with passes over memory.

A part is replaced where its code is Llama's, which most newer architectures have copied; any other stays as it is.
"""

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama as llama

ROTARY = "apply_rotary_pos_emb"


def fuse(model: PreTrainedModel) -> None:
    """Replace what is known in the modules of this model, and not in their classes, which others have too."""
    for module in model.modules():
        forward = type(module).forward
        if alike(forward, llama.LlamaRMSNorm.forward):
            module.forward = partial(normalised, module)
        elif ROTARY in forward.__code__.co_names and all(
            alike(forward.__globals__[name], getattr(llama, name)) for name in (ROTARY, "rotate_half")
        ):
            names = forward.__globals__ | {ROTARY: rotated}
            own = FunctionType(forward.__code__, names, closure=forward.__closure__)
            own.__defaults__, own.__kwdefaults__ = forward.__defaults__, forward.__kwdefaults__
            module.forward = MethodType(own, module)


def alike(function: Callable, known: Callable) -> bool:
    """Whether two functions are the same but for their docstrings; what wraps another one is not."""
    parts = []
    for each in (function, known):
        if not isinstance(each, FunctionType):
            return False
        code = each.__code__
        parts.append((code.co_code, code.co_names, [value for value in code.co_consts if value != each.__doc__]))
    return parts[0] == parts[1]


def normalised(norm: llama.LlamaRMSNorm, x: Tensor) -> Tensor:
    """LlamaRMSNorm's forward. The weight comes after, for there the model rounds what is normalised."""
    with torch.autocast(x.device.type, enabled=False):  # it would have x in float32
        return norm.weight * nn.functional.rms_norm(x, norm.weight.shape, eps=norm.variance_epsilon)


def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Llama's apply_rotary_pos_emb."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)


class Rotation(torch.autograd.Function):
    """x cos + (-x₂, x₁) sin, for the halves x₁ and x₂ of each head: x [..., d], cos and sin alike.

    To the bit what Llama's code gives, since each product and each sum is rounded as there.
    """

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        sin1, sin2 = sin.chunk(2, -1)
        return turned(x, cos, torch.cat([sin2, sin1], -1), 1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        cos, sin = ctx.saved_tensors
        return turned(gradient, cos, sin, -1), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, way: int) -> Tensor:
    """x cos + way (-y₂, y₁) for y = x sin."""
    result, y = x * cos, x * sin
    (result1, result2), (y1, y2) = result.chunk(2, -1), y.chunk(2, -1)
    result1.sub_(y2, alpha=way)
    result2.add_(y1, alpha=way)
    return result
