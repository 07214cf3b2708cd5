"""Ops: plain functions of tensors, each with a reference in PyTorch and, where built, compiled kernels."""

from lfm_fast.ops.guided_step import guided_step
from lfm_fast.ops.interpolate import interpolate
from lfm_fast.ops.philox_normal import philox_normal, philox_uniform
from lfm_fast.ops.velocity_loss import velocity_loss

__all__ = ["guided_step", "interpolate", "philox_normal", "philox_uniform", "velocity_loss"]
