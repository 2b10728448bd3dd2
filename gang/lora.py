"""One frozen matrix under N adapters: y = x Wᵀ + s (x Aᵀ) Bᵀ, with W multiplied once for the rows of all members."""

import bitsandbytes as bnb
import torch
from torch import Tensor, nn


def onednn(x: Tensor) -> bool:
    """Whether to call oneDNN by name: PyTorch's own choice for float32 on a CPU is MKL, which leaves the wide vector
    units of AMD's processors unused (docs/performance.md has the figures)."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., in] times weight [out, in] transposed."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "") if onednn(x) else x @ weight.mT


def products(x: Tensor, weights: Tensor) -> Tensor:
    """x [N, rows, in] times each member's weights [N, out, in] transposed."""
    if onednn(x):
        return torch.stack([product(*pair) for pair in zip(x, weights, strict=True)])
    return x @ weights.mT


class FrozenWeight:
    """The matrix W [out, in] of a frozen layer in the compute dtype, dequantised once if `keep`, else in each pass."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, keep: bool):
        self.layer, self.dtype = layer, dtype
        self.bias = None if layer.bias is None else layer.bias.data.to(dtype)
        self.kept = self.dequantised() if keep else None

    def dequantised(self) -> Tensor:
        weight = self.layer.weight.data
        if isinstance(self.layer.weight, bnb.nn.Params4bit):
            weight = bnb.functional.dequantize_4bit(weight, self.layer.weight.quant_state)
        return weight.to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y = product(x, self.dequantised() if self.kept is None else self.kept)
        return y if self.bias is None else y.add_(self.bias)

    def backward(self, gradient: Tensor) -> Tensor:
        return product(gradient, (self.dequantised() if self.kept is None else self.kept).mT)


class AdaptedProduct(torch.autograd.Function):
    """y [N, rows, out] of x [N, rows, in]; the adapters' gradients are added to `layer.a_gradient`, `layer.b_gradient`.

    `anchor` is a scalar that requires a gradient and gets none: it makes autograd call `backward` at the first layer
    too, where x requires none and so W is not multiplied.
    """

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, layer: "StackedLoRA") -> Tensor:
        a, b = layer.a.to(x.dtype), layer.b.to(x.dtype)
        z = products(x, a).mul_(layer.scaling)
        ctx.save_for_backward(x, z, a, b)
        ctx.layer = layer
        return layer.weight(x).baddbmm_(z, b.mT)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, z, a, b = ctx.saved_tensors
        layer = ctx.layer
        gradient = gradient.to(x.dtype)
        z_gradient = products(gradient, b.mT).mul_(layer.scaling)
        layer.b_gradient.add_((z.mT @ gradient).mT)
        if not layer.freeze_a:
            layer.a_gradient.add_(z_gradient.mT @ x)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return layer.weight.backward(gradient).baddbmm_(z_gradient, a), None, None


class StackedLoRA(nn.Module):
    """Takes the place of an adapted linear layer; the rows of its input are those of all members, one after another.

    a [N, r, in], b [N, out, r] and their gradients are windows on the stack; a member of lower rank than r has zeros
    in the rest, whose gradients are exactly zero. `a` is None: the base alone.
    """

    def __init__(self, base: nn.Module, dtype: torch.dtype, keep: bool):
        super().__init__()
        self.weight = FrozenWeight(base, dtype, keep)
        self.register_buffer("anchor", torch.zeros((), device=base.weight.device).requires_grad_(), persistent=False)
        self.a: Tensor | None = None
        self.freeze_a = False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.to(self.weight.dtype)
        if self.a is None:
            return self.weight(rows).to(x.dtype)
        rows = rows.reshape(len(self.a), -1, x.shape[-1])
        y = AdaptedProduct.apply(rows, self.anchor, self)
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)
