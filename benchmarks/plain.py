"""What one writes who has PyTorch alone: its own fused kernels, one after the other, which Inductor sees through."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from lfm_fast import ops as table
from lfm_fast.models import autoencoder_layers, dit, edm_layers, guided_layers, layers, spatial_transformer

WITHOUT_OPS = "plain"  # among backends: the networks without the ops of the table


def modulated_layer_norm(x, shift, scale, eps):
    normal = F.layer_norm(x, x.shape[-1:], eps=eps)
    return torch.addcmul(shift[:, None], normal.to(shift.dtype), 1 + scale[:, None])


def gated_residual_norm(x, branch, gate, shift, scale, eps):
    x_new = x + gate[:, None] * branch
    return x_new, modulated_layer_norm(x_new, shift, scale, eps)


def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


def group_norm_silu(x, num_groups, weight, bias, eps, silu=True):
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y, inplace=not y.requires_grad) if silu else y


def attention(q, k, v, scale=None):
    """In training in bf16, two products: the backward of PyTorch's fused CPU kernel takes far longer."""
    if q.requires_grad and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        weights = torch.softmax((q * (scale or q.shape[-1] ** -0.5)) @ k.transpose(-2, -1), dim=-1)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def self_attention(qkv, scale=None):
    return attention(*(x.transpose(1, 2) for x in qkv.unbind(2)), scale)


def mlp(x, weight_1, bias_1, weight_2, bias_2):
    return F.linear(gelu_tanh(F.linear(x, weight_1, bias_1)), weight_2, bias_2)


# of the rows whose reference is something else, or is timed beside another form
NORMS = (modulated_layer_norm, gated_residual_norm, group_norm_silu)
PLAIN = {f.__name__: f for f in (*NORMS, attention, self_attention)}
_OPS = SimpleNamespace(**PLAIN, gelu_tanh=gelu_tanh, linear=F.linear, mlp=mlp)


@contextmanager
def plain_pytorch():
    """Within: the networks call these functions instead of the library's ops."""
    using = (dit, layers, spatial_transformer, guided_layers, edm_layers, autoencoder_layers)
    before = {module: module.ops for module in using}
    for module in before:
        module.ops = _OPS
    try:
        yield
    finally:
        for module, ops in before.items():
            module.ops = ops


def forced(backend: str | None):
    """Context in which the ops run on `backend`; None leaves the choice to the table, WITHOUT_OPS takes them out."""
    if backend is None:
        return nullcontext()
    return _without_ops() if backend == WITHOUT_OPS else table.use_backend(backend)


@contextmanager
def _without_ops():
    with plain_pytorch(), table.use_backend("reference"):
        yield
