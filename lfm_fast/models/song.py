"""DDPM++ and NCSN++, U-Nets of Song et al. 2021 (arXiv 2011.13456), as Karras et al. 2022 (2206.00364) have them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm_fast.models.edm_layers import Filtered, GroupNorm, UNetBlock, filtered
from lfm_fast.models.edm_unet import EDMUNet, check_config
from lfm_fast.models.velocity_network import is_count, require_count

_NORM_EPS = 1e-6
_EMBEDDING = 4  # its width, in units of model_channels
_HALF = math.sqrt(0.5)  # what sums of two terms are multiplied by
_FOURIER_SCALE = 16.0
_NEAR_ZERO = 1e-5  # gain of the last layers: a variance of 1e-10


class SongUNet(EDMUNet):
    """U-Net of Song et al.; returns the velocity: v = model(t, z, y). Two of its forms have names.

    DDPM++ sees the time by positional features and resamples by means of four pixels. NCSN++ sees it by random Fourier
    features (`embedding_type="fourier"`, `channel_mult_noise` times as many), filters with taps 1, 3, 3, 1 when it
    resamples, and adds the input, resampled alike, to each level of its encoder (`encoder_type="residual"`).

    `image_size` is the side of the LATENT, halved once per further entry of `channel_mult`, by which `model_channels`
    is multiplied at each level. `attn_resolutions` are sides of maps that attend, with one head. t (B,) in [0, 1] is
    used raw, z is (B, C, H, W) in any floating dtype (it is cast to the weights'), y (B,) holds integer labels,
    `num_classes` of them; `y=None` and the `null_label` that a network with label dropout has are none of them. With
    `out_channels` below `in_channels` the rest of the input is a `condition` (`VelocityNetwork` says how it is given).
    Returns (B, out_channels, H, W) in the weights' dtype, or autocast's.

    Raises ValueError for sizes that do not divide, for other kinds of parts than these, and for inputs of another shape
    than the network was made for.

    >>> model = SongUNet(image_size=8, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
    >>> model(torch.rand(2), torch.randn(2, 4, 8, 8)).shape
    torch.Size([2, 4, 8, 8])

    Source: arXiv 2011.13456, section 4.3 and appendix H; arXiv 2206.00364, appendix F.1, table 7 and figure 17 (left).
    """

    family = "song"

    def __init__(
        self,
        *,
        image_size: int = 32,
        in_channels: int = 4,
        out_channels: int | None = None,
        model_channels: int = 128,
        channel_mult: list[int] = (2, 2, 2),
        num_blocks: int = 4,
        attn_resolutions: list[int] = (16,),
        dropout: float = 0.0,
        num_classes: int = 0,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: list[int] = (1, 1),
    ):
        config = {"image_size": image_size, "in_channels": in_channels, "out_channels": out_channels}
        config |= {"model_channels": model_channels, "channel_mult": channel_mult, "num_blocks": num_blocks}
        config |= {"attn_resolutions": attn_resolutions, "dropout": dropout}
        config |= {"num_classes": num_classes, "label_dropout": label_dropout, "embedding_type": embedding_type}
        config |= {"channel_mult_noise": channel_mult_noise, "encoder_type": encoder_type}
        config |= {"decoder_type": decoder_type, "resample_filter": resample_filter}
        super().__init__(_check_config(check_config(config)))
        width, features = _EMBEDDING * model_channels, model_channels * channel_mult_noise
        self.map_noise = FourierFeatures(features) if embedding_type == "fourier" else PositionalFeatures(features)
        self.map_label = nn.Linear(num_classes, features) if num_classes else None
        self.map_layer0 = nn.Linear(features, width)
        self.map_layer1 = nn.Linear(width, width)
        taps = tuple(resample_filter)

        def block(channels: int, result: int, attends: bool, factor: str | None) -> UNetBlock:
            settings = {"eps": _NORM_EPS, "factor": factor, "taps": taps, "num_heads": int(attends)}
            settings |= {"dropout": dropout, "modulates": False, "sum_scale": _HALF, "resampling_skip": True}
            return UNetBlock(channels, result, width, **settings)

        self.build(model_channels, block, only_last_attends=True)
        last = model_channels * channel_mult[0]
        self.dec[f"{image_size}x{image_size}_aux_norm"] = GroupNorm(last, _NORM_EPS)
        self.dec[f"{image_size}x{image_size}_aux_conv"] = nn.Conv2d(last, self.out_channels, 3, padding=1)
        self.initialise()

    def between_levels(self, side: int, channels: int) -> None:
        """NCSN++ adds the input there, at first z, then what it made of it one level above."""
        if self.config["encoder_type"] == "residual":
            before = [layer.out_channels for name, layer in self.enc.items() if name.endswith("_aux_residual")]
            above, taps = [self.in_channels, *before][-1], tuple(self.config["resample_filter"])
            self.enc[f"{side}x{side}_aux_residual"] = AuxiliaryInput(above, channels, taps)

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw fresh weights as published: variance 1 / (mean of fans), but next to none in the last layer of every
        branch and of the network, and a tenth in queries, keys and values."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, GroupNorm):
                module.reset_parameters()
            elif isinstance(module, FourierFeatures):
                nn.init.normal_(module.freqs, std=_FOURIER_SCALE)
        blocks = [module for module in self.modules() if isinstance(module, UNetBlock)]
        for layer in [self.out_conv, *(layer for block in blocks for layer in block.last_layers())]:
            nn.init.xavier_uniform_(layer.weight, gain=_NEAR_ZERO)
        for block in blocks:
            if block.num_heads:  # three layers in one tensor: the mean of its fans is twice that of each
                nn.init.xavier_uniform_(block.qkv.weight, gain=math.sqrt(2 * 0.1))

    @property
    def out_norm(self) -> GroupNorm:
        return self.dec[f"{self.image_size}x{self.image_size}_aux_norm"]

    @property
    def out_conv(self) -> nn.Conv2d:
        return self.dec[f"{self.image_size}x{self.image_size}_aux_conv"]

    def embedding(self, t: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, E) of times t (B,) and labels y (B,), SiLU behind it."""
        emb = self.map_noise(t.to(torch.promote_types(dtype, torch.float32))).to(dtype)
        if self.map_label is not None:
            emb = emb + self.map_label(self.one_hot(y, dtype) * math.sqrt(self.num_classes))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def encoded(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """What every layer of the encoder gives, from the first on; with the input added where there is a layer for
        that, in the place of what it is added to."""
        skips, auxiliary = [], x
        for name, layer in self.enc.items():
            if isinstance(layer, AuxiliaryInput):
                x = auxiliary = skips[-1] = (x + layer(auxiliary)) * _HALF
                continue
            x = layer(x) if name.endswith("_conv") else self.run(layer, x, emb)
            skips.append(x)
        return skips


class PositionalFeatures(nn.Module):
    """Raw times t (B,) -> (B, C): [sin(t f_i), cos(t f_i)], f_i = 10000^(-i / (C / 2 - 1)), in t's dtype."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, t: Tensor) -> Tensor:
        half = self.channels // 2
        index = torch.arange(half, device=t.device, dtype=t.dtype)
        angles = t[:, None] * torch.exp(index * (-math.log(10000.0) / (half - 1)))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class FourierFeatures(nn.Module):
    """Raw times t (B,) -> (B, C): [sin(2 pi t f_i), cos(2 pi t f_i)], f_i normal of deviation 16, in t's dtype.

    Source: Tancik et al. 2020 (arXiv 2006.10739), equation 5; arXiv 2011.13456, appendix C.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("freqs", torch.zeros(channels // 2))  # `initialise` draws them

    def _apply(self, function, recurse: bool = True) -> nn.Module:
        """Moved as any module, but never to 16 bits: times would differ by turns."""
        before = self.freqs
        super()._apply(function, recurse)
        if self.freqs.dtype.itemsize == 2:
            self.freqs = before.to(self.freqs.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * (2 * math.pi * self.freqs.to(t.dtype))
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class AuxiliaryInput(Filtered, nn.Conv2d):
    """Maps (B, C_in, H, W) -> (B, C, H / 2, W / 2): a 3x3 convolution, then the filter, every second pixel.

    Both are convolutions and may change places. The filter first, and then every second pixel of the other is a quarter
    of the work, and the filter has C_in channels to pass instead of C.
    """

    def __init__(self, in_channels: int, channels: int, taps: tuple[int, ...]):
        super().__init__(in_channels, channels, 3, stride=2)
        self.around = 1 + (len(taps) - 1) // 2
        self.set_filter(taps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(filtered(x, self.resample_filter, self.around))


def _check_config(config: dict) -> dict:
    """The configuration. Raises ValueError for parts of another kind than these networks have."""
    kinds = {"embedding_type": ("positional", "fourier"), "encoder_type": ("standard", "residual")}
    for name, known in (kinds | {"decoder_type": ("standard",)}).items():
        if config[name] not in known:
            raise ValueError(f"{name} is {config[name]!r}, expected {' or '.join(map(repr, known))}.")
    require_count("channel_mult_noise", config["channel_mult_noise"])
    taps = config["resample_filter"]
    if not isinstance(taps, list) or len(taps) % 2 or not taps or not all(is_count(tap) and tap > 0 for tap in taps):
        raise ValueError(f"resample_filter must be an even number of positive integers, but is {taps!r}.")
    features = config["model_channels"] * config["channel_mult_noise"]
    if features % 2 or features < 4:
        raise ValueError(f"the time's {features} features must be even and four or more; choose other model_channels.")
    return config
