"""ADM, the U-Net of Dhariwal and Nichol 2021 (arXiv 2105.05233), as Karras et al. 2022 (arXiv 2206.00364) have it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm_fast.models.edm_layers import GroupNorm, UNetBlock
from lfm_fast.models.edm_unet import EDMUNet, check_config
from lfm_fast.models.layers import time_features

_NORM_EPS = 1e-5
_HEAD_SIZE = 64  # channels of a head; maps with fewer channels have no attention
_EMBEDDING = 4  # its width, in units of model_channels


class ADM(EDMUNet):
    """U-Net with modulated group norms and attention in heads of 64 channels; returns the velocity: v = model(t, z, y).

    `image_size` is the side of the LATENT, halved once per further entry of `channel_mult`, by which `model_channels`
    is multiplied at each level. `attn_resolutions` are sides of maps that attend. t (B,) in [0, 1] is used raw, z is
    (B, C, H, W) in any floating dtype (it is cast to the weights'), y (B,) holds integer labels, `num_classes`
    of them. `y=None` and the `null_label` that a network with label dropout has leave the label's embedding out. With
    `out_channels` below `in_channels` the rest of the input is a `condition` (`VelocityNetwork` says how it is given).
    Returns (B, out_channels, H, W) in the weights' dtype, or autocast's.

    Raises ValueError for sizes that do not divide, and for inputs of another shape than the network was made for.

    >>> model = ADM(image_size=8, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
    >>> model(torch.rand(2), torch.randn(2, 4, 8, 8)).shape
    torch.Size([2, 4, 8, 8])

    Source: arXiv 2105.05233, section 3; arXiv 2206.00364, appendix F.1, table 7 and figure 17 (right).
    """

    family = "adm"

    def __init__(
        self,
        *,
        image_size: int = 32,
        in_channels: int = 4,
        out_channels: int | None = None,
        model_channels: int = 256,
        channel_mult: list[int] = (1, 2, 3, 4),
        num_blocks: int = 2,
        attn_resolutions: list[int] = (16, 8, 4),
        dropout: float = 0.0,
        num_classes: int = 0,
        label_dropout: float = 0.0,
    ):
        config = {"image_size": image_size, "in_channels": in_channels, "out_channels": out_channels}
        config |= {"model_channels": model_channels, "channel_mult": channel_mult, "num_blocks": num_blocks}
        config |= {"attn_resolutions": attn_resolutions, "dropout": dropout}
        config |= {"num_classes": num_classes, "label_dropout": label_dropout}
        super().__init__(check_config(config))
        width = _EMBEDDING * model_channels
        self.map_layer0 = nn.Linear(model_channels, width)
        self.map_layer1 = nn.Linear(width, width)
        self.map_label = nn.Linear(num_classes, width, bias=False) if num_classes else None

        def block(channels: int, result: int, attends: bool, factor: str | None) -> UNetBlock:
            heads = result // _HEAD_SIZE if attends else 0
            settings = {"eps": _NORM_EPS, "factor": factor, "num_heads": heads, "dropout": dropout}
            return UNetBlock(channels, result, width, **settings)

        first = model_channels * channel_mult[0]
        self.build(first, block, only_last_attends=False)
        self.out_norm = GroupNorm(first, _NORM_EPS)
        self.out_conv = nn.Conv2d(first, self.out_channels, 3, padding=1)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw fresh weights as published: PyTorch's own, but for the last layer of every branch and of the network,
        which are zero, and the labels' embedding, which is normal."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | GroupNorm):
                module.reset_parameters()
        blocks = [module for module in self.modules() if isinstance(module, UNetBlock)]
        for layer in [self.out_conv, *(layer for block in blocks for layer in block.last_layers())]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def embedding(self, t: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, E) of times t (B,) and labels y (B,), SiLU behind it."""
        features = time_features(t, self.map_layer0.in_features, torch.promote_types(dtype, torch.float32))
        emb = self.map_layer1(F.silu(self.map_layer0(features.to(dtype))))
        if self.map_label is not None:
            emb = emb + self.map_label(self.one_hot(y, dtype))
        return F.silu(emb)
