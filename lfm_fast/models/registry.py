"""The networks by name, and the ways to build one: by name, from its own configuration, from the reference's."""

import difflib

from torch import nn

from lfm_fast.models.adm import ADM
from lfm_fast.models.conditioned import Conditioned
from lfm_fast.models.dit import DiT
from lfm_fast.models.layout_unet import LayoutUNet
from lfm_fast.models.reference_names import in_our_names
from lfm_fast.models.song import SongUNet
from lfm_fast.models.unet import UNet
from lfm_fast.models.velocity_network import is_count

# family -> class; a network's `config` names its family
FAMILIES = {network.family: network for network in (DiT, ADM, SongUNet, UNet, LayoutUNet, Conditioned)}

_DIT_SIZES = {
    "DiT-S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "DiT-B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "DiT-L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "DiT-XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}

# name -> (class, arguments): arXiv 2212.09748, table 1, and two small networks for the embedded data set: one with 64
# tokens, which ships trained, and one with 16, which learns something within minutes on two CPU cores
NETWORKS = {
    f"{name}/{patch_size}": (DiT, {**size, "patch_size": patch_size})
    for name, size in _DIT_SIZES.items()
    for patch_size in (2, 4, 8)
}
NETWORKS["DiT-Emoji/2"] = (DiT, {"hidden_size": 192, "depth": 5, "num_heads": 6, "patch_size": 2})
NETWORKS["DiT-Emoji/4"] = (DiT, {"hidden_size": 256, "depth": 6, "num_heads": 8, "patch_size": 4})
NETWORKS["adm"] = (ADM, {})  # of LFM's FFHQ, LSUN bedroom and ImageNet networks, but for their labels
NETWORKS["ddpm++"] = (SongUNet, {})  # arXiv 2206.00364, table 7, its CIFAR-10 networks
NETWORKS["ncsn++"] = (
    SongUNet,
    {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual", "resample_filter": [1, 3, 3, 1]},
)

# arXiv 2307.08698, as released for LSUN church and for inpainting and semantic synthesis, for CelebA-HQ at two sizes,
# the same under a context, and small ones for the embedded data set
NETWORKS["adm-original"] = (UNet, {})
NETWORKS["adm-original-celeba256"] = (UNet, {"channel_mult": (1, 2, 2, 2)})
NETWORKS["adm-original-celeba512"] = (UNet, {"channel_mult": (1, 2, 2, 2, 4)})
NETWORKS["adm-layout"] = (LayoutUNet, {})
_EMOJI = {"model_channels": 64, "channel_mult": (1, 2, 2), "num_res_blocks": 1, "attention_resolutions": (2, 4)}
NETWORKS["ADM-Emoji"] = (UNet, _EMOJI)
NETWORKS["ADM-Emoji-layout"] = (LayoutUNet, {**_EMOJI, "context_dim": 128})


def create_model(
    name: str,
    *,
    image_size: int = 256,
    in_channels: int = 4,
    num_classes: int = 0,
    label_dropout: float = 0.0,
    downsampling: int = 8,
    **overrides,
) -> nn.Module:
    """Build a network by its name, with fresh weights, for images of `image_size` pixels.

    Names: DiT-S, DiT-B, DiT-L and DiT-XL with patches /2, /4 and /8 (arXiv 2212.09748, table 1); the U-Nets adm, ddpm++
    and ncsn++ (arXiv 2206.00364, table 7), adm-original (arXiv 2105.05233) and adm-layout; small ones for the embedded
    data set, DiT-Emoji/2 and /4, ADM-Emoji and ADM-Emoji-layout. The network sees latents of side image_size /
    downsampling with `in_channels` channels. `overrides` replace arguments of the named network. Raises ValueError for
    an unknown name or argument and for sizes that do not divide.

    >>> model = create_model("DiT-S/8", image_size=64, num_classes=10, label_dropout=0.1)
    >>> model.config["image_size"], model.null_label
    (8, 10)
    """
    if not isinstance(name, str) or name not in NETWORKS:
        close = difflib.get_close_matches(str(name), NETWORKS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known names: {', '.join(NETWORKS)}."
        raise ValueError(f"there is no network called {name!r}; {hint}")
    for argument, value in (("image_size", image_size), ("downsampling", downsampling)):
        if not is_count(value):
            raise ValueError(f"{argument} must be a positive integer, but is {value!r}.")
    if downsampling < 1 or image_size < 1 or image_size % downsampling:
        raise ValueError(f"image_size {image_size} is no multiple of the autoencoder's downsampling {downsampling}.")
    network, arguments = NETWORKS[name]
    common = {"in_channels": in_channels, "num_classes": num_classes, "label_dropout": label_dropout}
    return _build(network, {**arguments, **common, "image_size": image_size // downsampling, **overrides})


def from_config(config: dict) -> nn.Module:
    """Rebuild a network, with fresh weights, from what its `config` attribute held."""
    arguments = _copied(config)
    return _build(_network_of(arguments.pop("family", None)), arguments)


def from_reference_config(config: dict) -> nn.Module:
    """Build a network from the reference implementation's argument names and `family`.

    The reference writes an unlabelled DiT as one class without label dropout; ours is `num_classes=0`, with the same
    single row in its label table; its U-Nets without labels have None classes. A parameter count (`params`) beside the
    arguments is ignored, as are arguments that change nothing of what is computed. Raises ValueError for an argument
    that does change it and that ours has not.
    """
    config = _copied(config)
    family = config.pop("family", None)
    network = _network_of(family)
    config.pop("params", None)
    return _build(network, in_our_names(family, config))


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, frozen ones (a DiT's position table) included, as published counts have it."""
    return sum(parameter.numel() for parameter in model.parameters())


def _copied(config: dict) -> dict:
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"a network's configuration is a dict from names to values, but this is {config!r:.100}.")
    return dict(config)


def _network_of(family: str | None) -> type[nn.Module]:
    if not isinstance(family, str) or family not in FAMILIES:
        raise ValueError(
            f"a network's configuration must name its family, one of {', '.join(FAMILIES)}; got {family!r}."
        )
    return FAMILIES[family]


def _build(network: type[nn.Module], arguments: dict) -> nn.Module:
    known = network.__init__.__kwdefaults__ or {}
    names = [name for name in network.__init__.__annotations__ if name != "return"]
    unknown, missing = sorted(set(arguments) - set(names)), sorted(set(names) - set(arguments) - set(known))
    if unknown:
        raise ValueError(f"{network.__name__} has no argument {', '.join(unknown)}; it takes {', '.join(names)}.")
    if missing:
        raise ValueError(f"{network.__name__} needs {', '.join(missing)}.")
    return network(**arguments)
