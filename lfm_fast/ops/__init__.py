"""Ops: plain functions of tensors, each a row with a reference in PyTorch and, where built, compiled kernels.

A new op is one row file (see `_registry.Op`), its kernels, and one import line here.
"""

from lfm_fast.ops._explain import explain
from lfm_fast.ops._registry import use_backend
from lfm_fast.ops.adamw_ema import adamw_ema
from lfm_fast.ops.attention import attention
from lfm_fast.ops.gated_residual_norm import gated_residual_norm
from lfm_fast.ops.gelu_tanh import gelu_tanh
from lfm_fast.ops.group_norm_silu import group_norm_silu
from lfm_fast.ops.guided_step import guided_step
from lfm_fast.ops.interpolate import interpolate
from lfm_fast.ops.linear import linear
from lfm_fast.ops.mlp import mlp
from lfm_fast.ops.modulated_layer_norm import modulated_layer_norm
from lfm_fast.ops.packed_linear import packed_linear
from lfm_fast.ops.packed_linear_int8 import packed_linear_int8
from lfm_fast.ops.philox_normal import philox_normal, philox_uniform
from lfm_fast.ops.posterior_interpolate import posterior_interpolate
from lfm_fast.ops.self_attention import self_attention
from lfm_fast.ops.velocity_loss import velocity_loss

__all__ = [
    "adamw_ema",
    "attention",
    "explain",
    "gated_residual_norm",
    "gelu_tanh",
    "group_norm_silu",
    "guided_step",
    "interpolate",
    "linear",
    "mlp",
    "modulated_layer_norm",
    "packed_linear",
    "packed_linear_int8",
    "philox_normal",
    "philox_uniform",
    "posterior_interpolate",
    "self_attention",
    "use_backend",
    "velocity_loss",
]
