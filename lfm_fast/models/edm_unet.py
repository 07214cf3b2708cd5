"""What ADM, DDPM++ and NCSN++ share: encoder and decoder of residual blocks, as Karras et al. 2022 name them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lfm_fast.models.convolutional import ConvolutionalNetwork
from lfm_fast.models.edm_layers import UNetBlock
from lfm_fast.models.velocity_network import (
    check_channels,
    check_label_sizes,
    is_count,
    is_share,
    require_count,
)


class EDMUNet(ConvolutionalNetwork):
    """U-Net of blocks under the time's and the label's embedding (B, E), which a subclass makes in `embedding`.

    A subclass fills `enc` and `dec` by `build`, and gives `embedding(t, y, dtype)`, `out_norm`, `out_conv` and
    `initialise()`. Blocks are named SIDExSIDE_KIND, as in the checkpoints of these networks.

    Source: arXiv 2206.00364, appendix F.1 and table 7.
    """

    def build(self, first: int, block: Callable[..., UNetBlock], only_last_attends: bool) -> None:
        """Encoder and decoder: `block(in_channels, out_channels, attends, factor)` makes one block.

        first: channels of the first convolution. only_last_attends: of a level's blocks in the decoder, whether only
        the last attends, or each does, where the level's side is among `attn_resolutions`.
        """
        config, count = self.config, self.config["num_blocks"]
        sides = [config["image_size"] >> level for level in range(len(config["channel_mult"]))]
        widths = [config["model_channels"] * factor for factor in config["channel_mult"]]
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        skips = []  # channels of what the encoder hands to the decoder
        for level, (side, width) in enumerate(zip(sides, widths)):
            attends = side in config["attn_resolutions"]
            if level == 0:
                self.enc[f"{side}x{side}_conv"] = nn.Conv2d(config["in_channels"], first, 3, padding=1)
                skips.append(first)
            else:
                self.enc[f"{side}x{side}_down"] = block(skips[-1], skips[-1], False, "down")
                self.between_levels(side, skips[-1])
                skips.append(skips[-1])
            for index in range(count):
                self.enc[f"{side}x{side}_block{index}"] = block(skips[-1], width, attends, None)
                skips.append(width)
        now = widths[-1]
        for level, (side, width) in reversed(list(enumerate(zip(sides, widths)))):
            attends = side in config["attn_resolutions"]
            if level == len(sides) - 1:
                self.dec[f"{side}x{side}_in0"] = block(now, now, True, None)
                self.dec[f"{side}x{side}_in1"] = block(now, now, False, None)
            else:
                self.dec[f"{side}x{side}_up"] = block(now, now, False, "up")
            for index in range(count + 1):
                now += skips.pop()
                attends_here = attends and (index == count or not only_last_attends)
                self.dec[f"{side}x{side}_block{index}"] = block(now, width, attends_here, None)
                now = width

    def between_levels(self, side: int, channels: int) -> None:
        """Add what a network has behind the block that halves the side to `side`; most have nothing there."""

    def velocity(self, t: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """The network proper, all inputs explicit: compile this and labelled and unlabelled calls share one graph."""
        dtype = self.map_layer0.weight.dtype
        emb = self.embedding(t, y, dtype)
        skips = self.encoded(self.maps(z), emb)
        x = skips[-1]
        for name, block in self.dec.items():
            if "_block" in name:  # in0, in1 and up take no skip
                x = torch.cat([x, skips.pop()], dim=1)
            if isinstance(block, UNetBlock):
                x = self.run(block, x, emb)
        return self.out_conv(self.out_norm(x))

    def encoded(self, x: Tensor, emb: Tensor) -> list[Tensor]:
        """What every layer of the encoder gives, from the first on."""
        skips = []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("_conv") else self.run(layer, x, emb)
            skips.append(x)
        return skips

    def one_hot(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, num_classes); all zero for the null label, which comes behind the others. Asserts, on a GPU too, that
        there is no label behind that."""
        rows = torch.zeros(y.shape[0], self.num_classes + 1, dtype=dtype, device=y.device)
        return rows.scatter(1, y.long()[:, None], 1.0)[:, :-1]


def check_config(config: dict) -> dict:
    """The configuration with lists where it may have tuples. Raises ValueError unless these are sizes of a U-Net."""
    check_channels(config)
    for name in ("model_channels", "num_blocks"):
        require_count(name, config[name])
    for name in ("channel_mult", "attn_resolutions"):
        values = config[name]
        if not isinstance(values, (list, tuple)) or not all(is_count(value) and value > 0 for value in values):
            raise ValueError(f"{name} must be a list of positive integers, but is {values!r}.")
    if not config["channel_mult"]:
        raise ValueError("channel_mult is empty, but needs a number for every level of the network.")
    halvings = len(config["channel_mult"]) - 1
    if config["image_size"] % 2**halvings:
        raise ValueError(
            f"the latent's side {config['image_size']} cannot be halved {halvings} times, as a channel_mult of "
            f"{halvings + 1} levels has it."
        )
    if not is_share(config["dropout"]):
        raise ValueError(f"dropout must lie in [0, 1), but is {config['dropout']!r}.")
    check_label_sizes(config["num_classes"], config["label_dropout"])
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
