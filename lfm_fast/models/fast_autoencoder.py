"""The network that an autoencoder computes with in inference: its weights once more, as the device computes best."""

import contextlib
import functools

import torch
from torch import nn

from lfm_fast import _library
from lfm_fast.models.autoencoder_layers import Attention, Subpixel, Upsample
from lfm_fast.models.kl_autoencoder import KLAutoencoder, apart, unknown_part
from lfm_fast.models.packed import PackedLinear, PackedLinearFloat
from lfm_fast.models.packed_convolution import pack_convolutions
from lfm_fast.models.precision import float32_products
from lfm_fast.models.precision import why_not as why_not_on
from lfm_fast.models.small_vae import SmallVAE
from lfm_fast.models.winograd import with_fewer_products

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SAME = 1e-4  # how far two implementations may be apart in float32, each rounding in its own order
_PACKED = {"fp32": PackedLinearFloat, "bf16": PackedLinear}


def why_not(network: nn.Module, precision: str, device: torch.device) -> str | None:
    """Why there is no faster form of this network in this precision, as a sentence without full stop, or None."""
    if precision not in DTYPES:
        return f"precision is {precision!r}, expected {', '.join(DTYPES)}"
    if reason := why_not_on(precision, device):
        return reason
    if precision == "fp16" and device.type == "cpu":
        return "precision fp16 of an autoencoder is for GPUs; use bf16 or fp32 on a CPU"
    return why_not_of(network)


def why_not_of(network: nn.Module) -> str | None:
    """The same for any precision and device."""
    if type(network) is SmallVAE:
        return None
    if type(network).__name__ != "AutoencoderKL" or not type(network).__module__.startswith("diffusers."):
        return f"the autoencoder is a {type(network).__name__}, neither AutoencoderKL nor SmallVAE; use it as it is"
    if reason := unknown_part(network.config):
        return reason
    return why_not_in_tiles(network) or _why_not_the_same(network)


def why_not_in_tiles(network: nn.Module) -> str | None:
    """The same of one thing, which a network may be told at any time."""
    if getattr(network, "use_tiling", False):
        return "the autoencoder was told to work in tiles; use it as it is, or disable its tiling"
    return None


def _why_not_the_same(network: nn.Module) -> str | None:
    """By trying it on a small image, in float32: the configuration does not tell all that a version computes."""
    weight = next(network.parameters())
    if weight.dtype is not torch.float32:
        return f"the autoencoder's weights are {str(weight.dtype).removeprefix('torch.')}; load them in float32"
    try:
        ours = _with_weights_of(network, torch.float32)
    except (KeyError, RuntimeError, TypeError):
        return "the autoencoder's weights are not those that its configuration describes; use it as it is"
    side = 2 * 2 ** (len(network.config["block_out_channels"]) - 1)
    shape = 1, network.config.get("in_channels", 3), side, side
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if (error := apart(ours, network, image.to(weight.device))) > _SAME:
        return f"the autoencoder computes another thing than its configuration describes (off by {error:.1g})"
    return None


def faster(network: nn.Module, precision: str) -> nn.Module:
    """A network of encode(x) and decode(z), x and z in `precision`, that computes what this one does."""
    device = next(network.parameters()).device
    fast = _with_weights_of(network, DTYPES[precision])
    if device.type == "cpu":
        _double_by_pixels(fast, network.state_dict())
        if precision in _PACKED and _library.why_no_tiles() is None:
            _pack_attention(fast, network, _PACKED[precision])
        pack_convolutions(fast)
        if precision == "fp32":
            with_fewer_products(fast)
    fast.products = functools.partial(float32_products, True) if precision == "tf32" else contextlib.nullcontext
    return fast


def _with_weights_of(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Ours, convolutions and linear layers in this dtype and with channels innermost, norms as they are."""
    config = {name: value for name, value in dict(network.config).items() if not name.startswith("_")}
    with torch.device("meta"):
        ours = SmallVAE(**config) if type(network) is SmallVAE else KLAutoencoder(config)
    norms = [name for name, module in ours.named_modules() if isinstance(module, nn.GroupNorm)]
    weights = {}
    for name, value in network.state_dict().items():
        value = value.detach() if name.rpartition(".")[0] in norms else value.detach().to(dtype)
        weights[name] = value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
    ours.load_state_dict(weights, assign=True)
    return ours.eval().requires_grad_(False)


def _double_by_pixels(fast: nn.Module, weights: dict) -> None:
    """Put `Subpixel` in the place of what doubles the sides, with its sums made of the weights before rounding."""
    for name, module in list(fast.named_modules()):
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        for at, layer in enumerate(module):
            if isinstance(layer, Upsample):
                module[at] = Subpixel(layer.conv, weights[f"{name}.{at}.conv.weight"])
            elif isinstance(layer, nn.Upsample):
                module[at] = nn.Identity()
                module[at + 1] = Subpixel(module[at + 1], weights[f"{name}.{at + 1}.weight"])


def _pack_attention(fast: nn.Module, network: nn.Module, packed: type[PackedLinear]) -> None:
    for name, module in fast.named_modules():
        if isinstance(module, Attention):
            original = network.get_submodule(name)
            for part in ("to_q", "to_k", "to_v"):
                setattr(module, part, packed(getattr(original, part)))
            module.to_out[0] = packed(original.to_out[0])
