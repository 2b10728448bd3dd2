"""One frozen matrix under N adapters: y = x Wᵀ + s (x Aᵀ) Bᵀ, with W multiplied once for the rows of all members."""

import torch
from torch import Tensor, nn

from model import dequantised


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

    def __init__(self, layer: nn.Linear, dtype: torch.dtype, keep: bool):
        self.layer, self.dtype = layer, dtype
        self.bias = None if layer.bias is None else layer.bias.data.to(dtype)
        self.kept = self.matrix() if keep else None

    def matrix(self) -> Tensor:
        return dequantised(self.layer).to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        y = product(x, self.matrix() if self.kept is None else self.kept)
        return y if self.bias is None else y.add_(self.bias)

    def backward(self, gradient: Tensor) -> Tensor:
        return product(gradient, (self.matrix() if self.kept is None else self.kept).mT)


class AdaptedProduct(torch.autograd.Function):
    """y [rows, out] of x [rows, in], the rows of the N members one member after another; the adapters' gradients are
    added to `layer.a_gradient`, `layer.b_gradient`.

    `anchor` is a scalar that requires a gradient and gets none: it makes autograd call `backward` at the first layer
    too, where x requires none and so W is not multiplied.
    """

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, layer: "StackedLoRA") -> Tensor:
        a, b = layer.a.to(x.dtype), layer.b.to(x.dtype)
        z = products(x.unflatten(0, (len(a), -1)), a).mul_(layer.scaling)
        ctx.save_for_backward(x, z, a, b)
        ctx.layer = layer
        y = layer.weight(x)
        y.unflatten(0, (len(a), -1)).baddbmm_(z, b.mT)
        return y  # itself, not a view of it: a model may add to it in place

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, z, a, b = ctx.saved_tensors
        layer = ctx.layer
        x, gradient = (rows.unflatten(0, (len(a), -1)) for rows in (x, gradient.to(x.dtype)))
        z_gradient = products(gradient, b.mT).mul_(layer.scaling)
        layer.b_gradient.add_((z.mT @ gradient).mT)
        if not layer.freeze_a:
            layer.a_gradient.add_(z_gradient.mT @ x)
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return layer.weight.backward(gradient).baddbmm_(z_gradient, a).flatten(0, 1), None, None


class StackedLoRA(nn.Module):
    """Takes the place of an adapted linear layer; the rows of its input are those of all members, one after another.

    a [N, r, in], b [N, out, r] and their gradients are windows on the stack; a member of lower rank than r has zeros
    in the rest, whose gradients are exactly zero. `a` is None: the base alone.
    """

    scaling: Tensor  # [N, 1, 1]: α/r of each member

    def __init__(self, base: nn.Linear, dtype: torch.dtype, keep: bool):
        super().__init__()
        self.weight = FrozenWeight(base, dtype, keep)
        self.register_buffer("anchor", torch.zeros((), device=base.weight.device).requires_grad_(), persistent=False)
        self.a: Tensor | None = None
        self.freeze_a = False

    def forward(self, x: Tensor) -> Tensor:
        rows = x.to(self.weight.dtype)
        if self.a is None:
            return self.weight(rows).to(x.dtype)
        y = AdaptedProduct.apply(rows.reshape(-1, x.shape[-1]), self.anchor, self)
        return y.view(*x.shape[:-1], -1).to(x.dtype)
