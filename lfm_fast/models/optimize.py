"""`lfm_fast.optimize`: the same network, called the same way, on its fastest path."""

import copy

import torch
from torch import nn

from lfm_fast import _library
from lfm_fast.models.dit import DiT
from lfm_fast.models.layers import Mlp
from lfm_fast.models.packed import PackedLinear, PackedMlp

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MODES = ("inference",)


def optimize(model: nn.Module, precision: str = "bf16", mode: str = "inference") -> nn.Module:
    """The network on its fastest path: the same call, the same state dict, the same velocity up to rounding.

        optimize(model)(t, z, y) = model(t, z, y) + O(rounding of `precision`)

    Args:
        model: a network of `lfm_fast.create_model`; it is left as it is.
        precision: "bf16", "fp32" or "fp16". On a CPU with matrix tiles (AMX), bf16 multiplies packed weights with bias
            and GELU in one pass.
        mode: "inference": a copy that holds the weights in that precision, frozen and in eval mode. Train the original
            and call `optimize` again.

    Returns:
        A network that `lfm_fast.sample` takes like any other. Its state dict has the original's names and shapes.

    Raises:
        ValueError: another network than ours, or an unknown precision or mode.

    Example:
        >>> import torch, lfm_fast
        >>> model = lfm_fast.create_model("DiT-S/8", image_size=64)
        >>> fast = lfm_fast.optimize(model)
        >>> fast(torch.rand(2), torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
    """
    if type(model) is not DiT:
        raise ValueError(
            f"optimize takes a network of lfm_fast.create_model (a DiT), but this is {type(model).__name__}."
        )
    for name, value, known in (("precision", precision, (*_DTYPES,)), ("mode", mode, _MODES)):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name} is {value!r}, expected {' or '.join(known)}.")
    fast = copy.deepcopy(model).eval().requires_grad_(False).to(_DTYPES[precision])
    device = next(fast.parameters()).device
    if precision == "bf16" and device.type == "cpu" and _library.why_no_tiles() is None:
        _pack(fast)
    return fast


def _pack(module: nn.Module) -> None:
    """Replace the linear layers below, in place."""
    for name, child in module.named_children():
        if isinstance(child, Mlp):
            setattr(module, name, PackedMlp(child))
        elif isinstance(child, nn.Linear):
            setattr(module, name, PackedLinear(child))
        else:
            _pack(child)
