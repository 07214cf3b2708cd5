"""Convolutions of a network that is only sampled from any more: weights in the order that oneDNN computes with.

PyTorch's own call puts a weight into that order each time, which takes longer than a small convolution itself.
"""

import torch
from torch import Tensor, nn

from lfm_fast.models.edm_layers import ResamplingConv2d
from lfm_fast.ops._registry import inside_transform


def why_not() -> str | None:
    """Why no weight can be put into oneDNN's order here, or None."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    return None if there else "this PyTorch is built without oneDNN"


class _Packed:
    """A convolution beside whose weight stands the same in oneDNN's order, made at the first call and again when the
    weight has changed. Calls that cannot use it (gradients, other devices and dtypes) are the plain convolution's."""

    _order = None  # (what it was made of, the weight in oneDNN's order)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not _serves(x, weight):
            return super()._conv_forward(x, weight, bias)
        packed, how = self._packed(x, weight)
        return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *how, "none", [], "")

    def _packed(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple]:
        """The weight in oneDNN's order for inputs such as x, and padding, stride, dilation and groups."""
        how = (self.padding, self.stride, self.dilation, self.groups)
        made_of = (weight.data_ptr(), weight._version)
        if self._order is None or self._order[0] != made_of:
            self._order = made_of, torch.ops.mkldnn._reorder_convolution_weight(weight.detach(), *how, list(x.shape))
        return self._order[1], how

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_order"}


class PackedConv2d(_Packed, nn.Conv2d):
    """What an nn.Conv2d computes."""


class PackedResamplingConv2d(_Packed, ResamplingConv2d):
    """What a ResamplingConv2d computes."""


_CLASSES = {nn.Conv2d: PackedConv2d, ResamplingConv2d: PackedResamplingConv2d}


def pack_convolutions(network: nn.Module) -> None:
    """Let the convolutions of a network use packed weights, in place; their state dicts are what they were."""
    for module in network.modules():
        module.__class__ = _CLASSES.get(type(module), type(module))


def added_to(skip: Tensor, convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """skip + convolution(x); where the weight is packed, the sum is written over `skip` while the products are made,
    and rounded once."""
    if not (isinstance(convolution, PackedConv2d) and _serves(x, convolution.weight) and _takes_sum(skip, x)):
        return skip + convolution(x)
    packed, how = convolution._packed(x, convolution.weight)
    pointwise = torch.ops.mkldnn._convolution_pointwise_.binary
    return pointwise(skip, x, packed, convolution.bias, *how, "add", 1.0, None, [], None)


def _takes_sum(skip: Tensor, x: Tensor) -> bool:
    """Whether `skip` may be written over."""
    if skip.dtype != x.dtype or (torch.is_grad_enabled() and skip.requires_grad):
        return False
    return torch.is_inference_mode_enabled() or not skip.is_inference()


def _serves(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or inside_transform() or x.device.type != "cpu" or not x.numel():
        return False
    if weight.is_inference():  # it has no version, and may change without a sign of it
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16) and why_not() is None
