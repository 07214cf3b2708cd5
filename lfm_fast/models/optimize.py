"""`lfm_fast.optimize`: the same network, called the same way, on its fastest path."""

import copy
import functools

import torch
from torch import Tensor, nn

from lfm_fast import _library
from lfm_fast.models import fp8
from lfm_fast.models.conditioned import Conditioned
from lfm_fast.models.convolutional import ConvolutionalNetwork
from lfm_fast.models.dit import DiT
from lfm_fast.models.packed import PackedLinear, PackedLinearFloat, PackedLinearInt8, PackedMlp
from lfm_fast.models.packed_convolution import pack_convolutions
from lfm_fast.models.precision import float32_products, why_not
from lfm_fast.models.recognise import read_dit_shapes, same_as
from lfm_fast.models.shapes import shapes_of
from lfm_fast.ops import _registry

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PACKED = {"bf16": PackedLinear, "fp32": PackedLinearFloat}
_PRECISIONS = {"inference": ("bf16", "fp32", "tf32", "fp16", "fp8", "int8"), "training": ("bf16", "fp32", "fp8")}


def optimize(model: nn.Module, precision: str = "bf16", mode: str = "inference") -> nn.Module:
    """The network on its fastest path: the same call, the same state dict, the same velocity up to rounding.

        optimize(model)(t, z, y) = model(t, z, y) + O(rounding of `precision`)

    Args:
        model: a network of `lfm_fast.create_model`; it is left as it is. In inference also another project's DiT, in
            an adapter of `lfm_fast.interop` or called as ours is: one whose weights have exactly the names and shapes,
            and that is seen to compute the same on a small input. Or an autoencoder of `lfm_fast.autoencoder`.
        precision: of the matrix products: "bf16", "fp32", "fp8" or, in inference, "tf32", "fp16" or "int8".
            On CPUs with matrix tiles (AMX), bf16 and fp32 multiply packed weights with bias and GELU in one pass; in
            fp32 a number is the sum of three bfloat16, which loses nothing. int8, which is for such CPUs alone,
            multiplies whole numbers in the layers that see every token, with a scale for every token and output.
            fp8, on GPUs that multiply it, is e4m3 in the same layers, gradients e5m2, with a scale for every row of a
            factor; the rest is bf16. tf32, on CUDA, is float32 with products of TF32 (for training,
            `lfm_fast.models.precision.float32_products` goes around forward and backward pass). int8 and fp8 are not
            for U-Nets; on a CPU, in inference, their convolutions hold packed weights beside the plain ones.
        mode: "inference": a copy that holds the weights in that precision, frozen and in eval mode; once the original
            has been trained on, call `optimize` again. "training": a network on the original's own Parameters, float32,
            that computes under autocast; an optimizer of either trains both.

    Returns:
        A network that `lfm_fast.sample` takes like any other. Its state dict has the original's names and shapes.

    Raises:
        ValueError: another network than these, an unknown precision or mode, or one that the device does not have.

    Example:
        >>> import torch, lfm_fast
        >>> model = lfm_fast.create_model("DiT-S/8", image_size=64)
        >>> fast = lfm_fast.optimize(model)
        >>> fast(torch.rand(2), torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])

    Source: Micikevicius et al. 2018, "Mixed precision training" (arXiv 1710.03740), for the float32 copy of weights.
    """
    if hasattr(type(model), "optimized"):  # an autoencoder
        return model.optimized(precision, mode)
    ours = isinstance(model, Conditioned | ConvolutionalNetwork) or type(model) is DiT
    if not ours and not _may_be_dit(model):
        raise ValueError(f"optimize takes a network of lfm_fast.create_model, but this is {type(model).__name__}.")
    if not isinstance(mode, str) or mode not in _PRECISIONS:
        raise ValueError(f"mode is {mode!r}, expected {' or '.join(_PRECISIONS)}.")
    known = _PRECISIONS[mode]
    if not isinstance(precision, str) or precision not in known:
        raise ValueError(f"precision is {precision!r}, expected {_listed(known)} in {mode}.")
    if isinstance(model, Conditioned):
        encoder = model.encoder if mode == "training" else copy.deepcopy(model.encoder).eval().requires_grad_(False)
        return Conditioned(network=optimize(model.network, precision, mode), encoder=encoder).train(mode == "training")
    if isinstance(model, ConvolutionalNetwork):
        return _convolutional(model, precision, mode)
    if type(model) is not DiT:
        return _of_another_class(model, precision, mode)
    return _for_training(model, precision) if mode == "training" else _for_inference(model, precision)


def _may_be_dit(model) -> bool:
    if isinstance(model, DiT) or not isinstance(model, nn.Module):
        return False
    return hasattr(type(model), "as_dit") or read_dit_shapes(shapes_of(model.state_dict())) is not None


def _of_another_class(model: nn.Module, precision: str, mode: str) -> nn.Module:
    """Ours for another project's network, alone or in an adapter of lfm_fast.interop, that is found to be a DiT."""
    if mode == "training":
        raise ValueError(f"training takes a network of lfm_fast.create_model (a DiT), not a {type(model).__name__}.")
    if hasattr(type(model), "as_dit"):
        return model.around(_for_inference(model.as_dit(), precision))
    return _for_inference(same_as(model), precision)


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:-1]) + " or " + names[-1]


def _why_not(model: DiT, precision: str) -> str | None:
    device = model.pos_embed.device
    if precision == "int8" and device.type != "cpu":
        return f"precision int8 is for inference on a CPU, but the network is on {device}; use bf16"
    if precision == "int8":
        reason = _registry.row("packed_linear_int8").named("cpp").available()
        return reason and f"precision int8 needs a CPU with matrix tiles, but {reason}; use fp32"
    return why_not(precision, device) or (fp8.why_not_sizes(model) if precision == "fp8" else None)


def _refuse(model: DiT, precision: str) -> None:
    reason = _why_not(model, precision)
    if reason is not None:
        raise ValueError(f"{reason}.")


def _for_inference(model: DiT, precision: str) -> DiT:
    _refuse(model, precision)
    if precision == "int8":
        return _packed(model, PackedLinearInt8, PackedLinear)
    if precision == "fp8":
        return _packed(model, fp8.PackedLinearFp8)
    if precision in _PACKED and model.pos_embed.device.type == "cpu" and _library.why_no_tiles() is None:
        return _packed(model, _PACKED[precision], _PACKED[precision])
    fast = _frozen(model, _DTYPES[precision])
    if precision == "tf32":
        fast.products = functools.partial(float32_products, True)
    return fast


def _convolutional(model: ConvolutionalNetwork, precision: str, mode: str) -> ConvolutionalNetwork:
    device = next(model.parameters()).device
    if precision in ("int8", "fp8"):
        raise ValueError(f"precision {precision} is for a DiT, and this is a {type(model).__name__}; use bf16.")
    if (reason := why_not(precision, device)) is not None:
        raise ValueError(f"{reason}.")
    if mode == "training":
        fast = _sharing(model)
        if precision == "bf16":
            fast.products = functools.partial(torch.autocast, device.type, torch.bfloat16)
        return fast
    fast = _frozen(model, _DTYPES[precision])
    if precision == "tf32":
        fast.products = functools.partial(float32_products, True)
    if device.type == "cpu":
        pack_convolutions(fast)
        if precision == "bf16" and _library.why_no_tiles() is None:
            _pack(fast, model, PackedLinear)
    return fast if device.type == "cpu" else fast.to(memory_format=torch.channels_last)


def _frozen(model: DiT, dtype: torch.dtype) -> DiT:
    with torch.inference_mode(False):  # or the packed weights could not follow a change of the plain ones
        return copy.deepcopy(model).eval().requires_grad_(False).to(dtype)


def _packed(model: DiT, layer: type[PackedLinear], other: type[PackedLinear] | None = None) -> DiT:
    """The network with its linear layers packed, those that see every token as `layer`.

    The others, of time, label and read-out, are a hundredth of the work, and all tokens hang on them.
    """
    fast = _frozen(model, layer.dtype if other is None else other.dtype)
    for block, original in zip(fast.blocks, model.blocks):
        _pack(block.attn, original.attn, layer)
        block.mlp = PackedMlp(original.mlp, layer)
    if other is not None:
        _pack(fast, model, other)
    return fast


def _pack(module: nn.Module, original: nn.Module, layer: type[PackedLinear]) -> None:
    """Replace the linear layers below, in place, by packed ones of the original's weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, layer(getattr(original, name)))
        else:
            _pack(child, getattr(original, name), layer)


class AutocastDiT(DiT):
    """A DiT in mixed precision: weights in float32, products in bfloat16."""

    def forward(self, t: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16):
            return super().forward(t, z, y)


def _sharing(model: nn.Module) -> nn.Module:
    """A copy on the original's own Parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _for_training(model: DiT, precision: str) -> DiT:
    _refuse(model, precision)
    fast = _sharing(model)
    if precision != "fp32":
        fast.__class__ = AutocastDiT
    if precision == "fp8":
        fp8.train_in_fp8(fast)
    return fast
