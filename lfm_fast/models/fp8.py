"""Linear layers whose products are of float8, scaled row by row, through PyTorch's scaled matrix product.

Values and weights are e4m3 (3 bits of mantissa, up to 448), gradients e5m2 (2 bits, up to 57344). Every row of a
factor, along the numbers that are summed, has a scale of its own, max |row| / largest, found as it comes. Products are
summed in float32 and rounded to bfloat16.

Source: Micikevicius et al. 2022, "FP8 formats for deep learning" (arXiv 2209.05433), section 3, for the formats.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lfm_fast import ops
from lfm_fast.models.layers import Linear
from lfm_fast.models.packed import PackedLinear
from lfm_fast.models.precision import E5M2, product, quantise

_BF16, _F32 = torch.bfloat16, torch.float32
MULTIPLE = 16  # of both sizes of a factor, for the tensor cores


class _Linear(torch.autograd.Function):
    """x W^T + b of rows x (M, K); each of its three products has factors quantised along what it sums over."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(quantise(x), quantise(weight), None if bias is None else bias.to(_BF16), fast=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = product(quantise(grad, E5M2), quantise(weight.t())).to(x.dtype)
        if ctx.needs_input_grad[1]:
            more = -len(x) % MULTIPLE  # the sum is over the rows
            columns, inputs = (F.pad(factor.t(), (0, more)) for factor in (grad, x))
            grad_weight = product(quantise(columns, E5M2), quantise(inputs)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=_F32).to(weight.dtype)
        return grad_x, grad_weight, grad_bias


class Fp8Linear(Linear):
    """A linear layer that is trained: weights as they are, quantised at every call; (..., K) -> (..., N) bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        y = _Linear.apply(x.to(_BF16).flatten(0, -2), self.weight, self.bias)
        return y.unflatten(0, x.shape[:-1])


class PackedLinearFp8(PackedLinear):
    """One that is not trained any more: weights in float8, which come out as float32."""

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        number, scale = quantise(weight)
        return {"weight": number, "scale": scale}

    def unpacked(self) -> Tensor:
        return self.weight.to(_F32) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        rows = quantise(x.to(_BF16).flatten(0, -2))
        y = product(rows, (self.weight, self.scale), self.bias, fast=True).unflatten(0, x.shape[:-1])
        return ops.gelu_tanh(y) if self.gelu else y


def why_not_sizes(model: nn.Module) -> str | None:
    """Why layers that see every token do not fit the tensor cores, as a sentence without full stop, or None."""
    for layer in _of_tokens(model):
        if layer.in_features % MULTIPLE or layer.out_features % MULTIPLE:
            return (
                f"precision fp8 multiplies matrices whose sizes are multiples of {MULTIPLE}, but a layer has "
                f"{layer.in_features} inputs and {layer.out_features} outputs; use bf16"
            )
    return None


def train_in_fp8(model: nn.Module) -> None:
    """Let the layers that see every token multiply float8, in place: their Parameters stay what they are."""
    for layer in _of_tokens(model):
        layer.__class__ = Fp8Linear


def _of_tokens(model: nn.Module) -> list[Linear]:
    parts = [part for block in model.blocks for part in (block.attn, block.mlp)]
    return [layer for part in parts for layer in part.modules() if isinstance(layer, Linear)]
