"""The U-Net of "Diffusion models beat GANs on image synthesis" (arXiv 2105.05233), section 3 and appendix B."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lfm_fast.models.convolutional import ConvolutionalNetwork
from lfm_fast.models.guided_layers import AttentionBlock, Downsample, GroupNorm, ResidualBlock, Upsample, down, up
from lfm_fast.models.layers import time_features
from lfm_fast.models.velocity_network import (
    check_channels,
    check_label_sizes,
    is_count,
    is_share,
    require_count,
)


class Stage(nn.Sequential):
    """Layers one after the other, each given what it needs beside x: the embedding, the context or nothing.

    skip: channels from the way down, put behind those of x; within, so that checkpointing does not keep them twice.
    """

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else torch.cat([x, skip], dim=1)
        for layer in self:
            if isinstance(layer, ResidualBlock):
                x = layer(x, emb)
            else:
                x = layer(x, context) if getattr(layer, "takes_context", False) else layer(x)
        return x


class UNet(ConvolutionalNetwork):
    """The U-Net of guided diffusion, "adm-original", that returns the velocity: v = model(t, z, y).

    t (B,) in [0, 1] is used raw, z is (B, C, H, W) in any floating dtype (it is cast to the weights'), y (B,) holds
    integer labels. With `num_classes` and `label_dropout` > 0 the label table has one more row, `null_label`, and
    `y=None` means that row; with labels and without that row, y has to be given. With `out_channels` below
    `in_channels` the rest of the input is a `condition` (`VelocityNetwork` says how it is given).

    Args:
        image_size: side of the latent.
        model_channels, channel_mult: level i has model_channels * channel_mult[i] channels, its sides are image_size /
            2^i; all are multiples of 32, the number of groups of the norms.
        num_res_blocks: of each level on the way down; one more on the way up.
        attention_resolutions: DOWNSAMPLING FACTORS of the levels with attention, the reference's meaning under its
            name: 8 is the 4x4 maps of a 32x32 latent, and a factor that no level has is no error. The middle attends.
        attention_sides: the same by the sides of the feature maps; where given, it stands for attention_resolutions.
        num_heads, num_heads_upsample: of attention, and of that on the way up (-1: as many).
        num_head_channels: channels of a head; other than -1 it decides the number of heads.
        use_scale_shift_norm: the embedding of time and label scales and shifts the second norm of a block (adaptive
            group norm), else it is added before it.
        resblock_updown: levels change in residual blocks, else by a convolution (conv_resample) or none.
        use_new_attention_order: channels of qkv in order (3, head, d), else (head, 3, d).
        dropout: before the last convolution of a block, in training; drawn by PyTorch's generator and not by sample
            number, so that a run with dropout does not go on to the bit.

    Raises ValueError for sizes that do not divide, and for inputs of another shape than the network was made for.

    >>> model = UNet(image_size=8, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_sides=(4,))
    >>> model(torch.rand(2), torch.randn(2, 4, 8, 8)).shape, model.config["attention_resolutions"]
    (torch.Size([2, 4, 8, 8]), [2])

    Source: arXiv 2105.05233, section 3 and table 4 (architecture), equation 7 (adaptive group norm).
    """

    family = "guided_diffusion"

    def __init__(
        self,
        *,
        image_size: int = 32,
        in_channels: int = 4,
        model_channels: int = 256,
        out_channels: int | None = None,
        num_res_blocks: int = 2,
        attention_resolutions: Sequence[int] = (16, 8),
        attention_sides: Sequence[int] | None = None,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_heads: int = 4,
        num_heads_upsample: int = -1,
        num_head_channels: int = -1,
        dropout: float = 0.0,
        conv_resample: bool = True,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        num_classes: int = 0,
        label_dropout: float = 0.0,
    ):
        self._build({name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def _build(self, config: dict) -> None:
        config = checked(config)
        super().__init__(config)
        width, channels = 4 * self.config["model_channels"], self.config["model_channels"]
        self.time_embed = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        if self.num_classes:
            self.label_emb = nn.Embedding(self.num_labels, width)
        first = Stage(nn.Conv2d(self.in_channels, channels, 3, padding=1))
        self.input_blocks, skips = nn.ModuleList([first]), [channels]
        last = len(config["channel_mult"]) - 1
        for level, attends, wide in self._levels():
            for _ in range(config["num_res_blocks"]):
                self.input_blocks.append(Stage(*self._residual(channels, wide, attends)))
                channels = wide
                skips.append(channels)
            if level < last:
                self.input_blocks.append(Stage(self._resample(channels, Downsample, down)))
                skips.append(channels)
        block, attention, again = *self._residual(channels, channels, True), *self._residual(channels, channels, False)
        self.middle_block = Stage(block, attention, again)
        self.output_blocks = nn.ModuleList()
        for level, attends, wide in reversed(list(self._levels())):
            for index in range(config["num_res_blocks"] + 1):
                stage = Stage(*self._residual(channels + skips.pop(), wide, attends, rising=True))
                channels = wide
                if level and index == config["num_res_blocks"]:
                    stage.append(self._resample(channels, Upsample, up))
                self.output_blocks.append(stage)
        self.out = nn.Sequential(GroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, self.out_channels, 3, padding=1))
        self.initialise()

    def _levels(self) -> Iterator[tuple[int, bool, int]]:
        """(level, whether it attends, its channels)."""
        for level, multiple in enumerate(self.config["channel_mult"]):
            yield level, 2**level in self.config["attention_resolutions"], multiple * self.config["model_channels"]

    def _residual(self, channels: int, out_channels: int, attends: bool, rising: bool = False) -> Iterator[nn.Module]:
        """A residual block, and the attention behind it where its level has some."""
        yield self._residual_block(channels, out_channels)
        if attends:
            yield self._attention(out_channels, heads(self.config, out_channels, rising))

    def _residual_block(self, channels: int, out_channels: int, **options) -> ResidualBlock:
        width, modulated = 4 * self.config["model_channels"], self.config["use_scale_shift_norm"]
        return ResidualBlock(channels, out_channels, width, self.config["dropout"], modulated, **options)

    def _attention(self, channels: int, num_heads: int) -> nn.Module:
        return AttentionBlock(channels, num_heads, self.config["use_new_attention_order"])

    def _resample(self, channels: int, layer: type[nn.Module], resample) -> nn.Module:
        if self.config["resblock_updown"]:
            return self._residual_block(channels, channels, resample=resample)
        return layer(channels, self.config["conv_resample"])

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw fresh weights: PyTorch's own, and zeros for what ends a residual branch and for the read-out, so that
        every branch starts as the identity and the velocity as zero.

        Source: Goyal et al. 2017 (arXiv 1706.02677), section 5.1, for residual branches that start as zero.
        """
        for module in self.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.out_layers[3].weight)
                nn.init.zeros_(module.out_layers[3].bias)
            elif hasattr(module, "proj_out"):
                nn.init.zeros_(module.proj_out.weight)
                nn.init.zeros_(module.proj_out.bias)
        nn.init.zeros_(self.out[2].weight)
        nn.init.zeros_(self.out[2].bias)

    def no_label(self) -> int:
        """What stands for y=None. Raises ValueError where nothing does."""
        if self.null_label is None:
            raise ValueError(
                f"this network knows {self.num_classes} classes and no label that means none of them; give y, or "
                "build it with label_dropout."
            )
        return self.null_label

    def velocity(self, t: Tensor, z: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The network proper, all inputs explicit: compile this and labelled and unlabelled calls share one graph."""
        emb, run = nn.functional.silu(self.embedding(t, y)), self.run
        h, skips = self.maps(z), []
        for stage in self.input_blocks:
            h = run(stage, h, emb, context)
            skips.append(h)
        h = run(self.middle_block, h, emb, context)
        for stage in self.output_blocks:
            h = run(stage, h, emb, context, skips.pop())
        return self.out[2](self.out[0](h))

    def embedding(self, t: Tensor, y: Tensor) -> Tensor:
        """Of times (B,) and labels (B,): (B, 4 model_channels)."""
        dtype = self.time_embed[0].bias.dtype
        features = time_features(t, self.config["model_channels"], torch.promote_types(dtype, torch.float32))
        emb = self.time_embed(features.to(dtype))
        return emb + self.label_emb(y) if self.num_classes else emb


def heads(config: dict, channels: int, rising: bool) -> int:
    """Number of heads of attention over so many channels, on the way up or not."""
    if config["num_head_channels"] != -1:
        return channels // config["num_head_channels"]
    upward = config.get("num_heads_upsample", -1)
    return upward if rising and upward != -1 else config["num_heads"]


def checked(config: dict) -> dict:
    """The configuration with lists of factors in the place of sequences and sides; ValueError of one sentence."""
    check_channels(config)
    check_label_sizes(config["num_classes"], config["label_dropout"])
    for name in ("model_channels", "num_res_blocks", "num_heads"):
        require_count(name, config[name])
    for name in ("num_head_channels", "num_heads_upsample"):
        if config.get(name, -1) != -1:
            require_count(name, config[name])
    for name in ("conv_resample", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order"):
        if not isinstance(config.get(name, False), bool):
            raise ValueError(f"{name} must be True or False, but is {config[name]!r}.")
    if not is_share(config["dropout"]):
        raise ValueError(f"dropout must lie in [0, 1), but is {config['dropout']!r}.")
    config = {**config, "channel_mult": _counts("channel_mult", config["channel_mult"])}
    sides = config.pop("attention_sides")
    factors = _counts("attention_resolutions", config["attention_resolutions"], least=0)
    config["attention_resolutions"] = factors if sides is None else _factors(config, sides)
    _check_levels(config)
    return config


def _counts(name: str, values, least: int = 1) -> list[int]:
    if isinstance(values, Sequence) and len(values) >= least and all(is_count(v) and v > 0 for v in values):
        return list(values)
    raise ValueError(f"{name} must be positive integers, one for each level it names, but is {values!r}.")


def _factors(config: dict, sides) -> list[int]:
    levels = {config["image_size"] // 2**i: 2**i for i in range(len(config["channel_mult"]))}
    unknown = [side for side in _counts("attention_sides", sides, least=0) if side not in levels]
    if unknown:
        raise ValueError(
            f"attention_sides holds {unknown[0]}, but the feature maps of this network have sides "
            f"{', '.join(map(str, levels))}."
        )
    return [levels[side] for side in sides]


def _check_levels(config: dict) -> None:
    levels = len(config["channel_mult"])
    last = levels - 1
    if config["image_size"] % 2**last:
        raise ValueError(
            f"the latent's side {config['image_size']} cannot be halved {last} times, as {levels} levels need."
        )
    for level, multiple in enumerate(config["channel_mult"]):
        channels = multiple * config["model_channels"]
        if channels % 32:
            raise ValueError(
                f"model_channels {config['model_channels']} times channel_mult gives {channels} channels, which is no "
                "multiple of 32, the number of groups of the norms."
            )
        # whether it attends on the way up or not; the middle, of the last level's channels, always does
        ways = (False, True) if 2**level in config["attention_resolutions"] else (False,) if level == last else ()
        width = config["num_head_channels"]
        if ways and width != -1 and channels % width:
            raise ValueError(f"{channels} channels cannot be split into heads of {width} channels.")
        for number in (heads(config, channels, rising) for rising in ways):
            if channels % number:
                raise ValueError(f"{channels} channels cannot be split into {number} heads.")
