"""Activation checkpointing: which tensors wait for the backward pass, and which are made again (`made_again`).

A U-Net's blocks each go through `made_again`; what follows is of a DiT's. In units of one bfloat16 tensor of tokens
(T, D), a block under autocast keeps about 26 for its backward pass. The products and the attention, which cost the
time, are 10 of them: q, k and v (3), attention (1), proj (1), fc1 (4) and fc2 (1). "selective" keeps those and makes
the elementwise rest again, which is a few passes over memory and no product; "full" keeps neither and repeats the
forward pass.

What a region of blocks takes in is kept as well, so the cut is made where least crosses it: after the MLP, before its
output is added. Then x (2 units, float32) and that output, a product that is kept anyway, cross; one pass later it
would be x and its norm. Two blocks make a region: half as many x wait, and no more than two blocks are made again at
once.
"""

import contextlib
import functools

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lfm_fast import ops

MODES = ("none", "selective", "full")
_BLOCKS = 2  # in a region

_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten._scaled_mm.default,
    _aten.convolution.default,
    torch.ops.lfm_fast.attention_with_lse.default,
    torch.ops.lfm_fast.tile_linear.default,
    torch.ops.lfm_fast.tile_mlp.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def set_mode(model, mode: str) -> None:
    """Let `model` keep for its backward pass what `mode` says. Raises ValueError for one that cannot choose."""
    if hasattr(model, "activation_checkpointing"):
        model.activation_checkpointing = mode
    elif mode != "none":
        raise ValueError(f"activation checkpointing is {mode!r}, but {type(model).__name__} keeps all activations.")


def through_blocks(blocks, head, x: Tensor, modulations: list[Tensor], mode: str, eps: float, run=None) -> Tensor:
    """The tokens x (B, T, D) through `blocks`, the last norm and `head`, keeping for backward what `mode` says.

    modulations: (B, 6 D) of each block and one more, whose first two parts are shift and scale of the last norm. run:
    what calls a region, such as a compiled form of `region`. Gradients are, to the bit, those without checkpointing.
    """
    run, branch, preceding = run or region, None, None
    for first in range(0, len(blocks), _BLOCKS):
        part, own = blocks[first : first + _BLOCKS], modulations[first : first + _BLOCKS]
        if first + _BLOCKS < len(blocks):
            x, branch = run((tuple(part), None, mode, eps), x, branch, preceding, *own)
            preceding = own[-1]
    return run((tuple(part), head, mode, eps), x, branch, preceding, *own, modulations[-1])


def region(modules, *tensors):
    """`_region` under `torch.utils.checkpoint`. modules: (blocks, head or None, mode, eps)."""
    blocks, head, mode, eps = modules

    def forward(*tensors):
        return _region(blocks, head, eps, *tensors)

    return made_again(forward, *tensors, mode=mode)


def made_again(function, *tensors, mode: str, dropout: bool = False):
    """`function(*tensors)`, of which the backward pass finds what `mode`, "selective" or "full", says; None may be
    among the tensors. dropout: the function draws random numbers, which the second time have to be the same."""
    choice = {"context_fn": _selective} if mode == "selective" else {}
    with _uncached_autocast(tensors[0].device.type):
        return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=dropout, **choice)


def _region(blocks, head, eps, x, branch, preceding, *modulations):
    """(x, branch) -> (x, branch): x without the MLP's output, and that output; with a head, what it makes of the sum.

    branch and preceding, the modulation whose gate belongs to it, are None before the first block.
    """
    for block, modulation in zip(blocks, modulations):
        x, h = _add_and_norm(x, branch, preceding, modulation, eps)
        x, branch = block.before_sum(x, h, modulation)
        preceding = modulation
    if head is None:
        return x, branch
    return head(_add_and_norm(x, branch, preceding, modulations[-1], eps)[1])


def _add_and_norm(x, branch, preceding, modulation, eps):
    shift, scale, *_ = modulation.chunk(6, dim=-1)
    if branch is None:
        return x, ops.modulated_layer_norm(x, shift, scale, eps)
    return ops.gated_residual_norm(x, branch, preceding.chunk(6, dim=-1)[5], shift, scale, eps)


def _uncached_autocast(device: str):
    """Autocast that converts a weight each time it is used.

    With its cache, whether the forward pass converts depends on what ran before; the second pass over a region could
    then have one conversion more than the first, which selective checkpointing takes for an error.
    """
    if not torch.is_autocast_enabled(device) or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


def _policy(context, op, *args, **kwargs):
    keep = op in _PRODUCTS or (op is _aten.bmm.default and not _makes_more(*args))
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _makes_more(a: Tensor, b: Tensor) -> bool:
    """Attention's scores q k^T, (T, T) per head: more than q or k hold where T > d, so they are made again."""
    rows, inner, columns = a.shape[1], a.shape[2], b.shape[2]
    return rows * columns > max(rows * inner, inner * columns)


_selective = functools.partial(create_selective_checkpoint_contexts, _policy)
