"""The U-Net under a context: arXiv 2112.10752, "High-resolution image synthesis with latent diffusion models"."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lfm_fast.models.spatial_transformer import SpatialTransformer
from lfm_fast.models.unet import UNet
from lfm_fast.models.velocity_network import require_count, require_tensors

_CONTEXT_TOKENS = 64  # of a context, where operations are counted


class LayoutUNet(UNet):
    """`UNet` with a transformer that looks at a context in place of attention, "adm-layout": v = model(t, z, y,
    context=context).

    context (B, L, D) floating, D = context_dim and any L: the tokens of any encoder, such as boxes with classes.

    Args:
        context_dim: channels of a token of the context.
        transformer_depth: blocks of a transformer; num_heads or num_head_channels say how many heads they have.
        Others as `UNet` has them.

    Raises ValueError as `UNet` does, and for a context that is missing or of another width.

    >>> sizes = {"model_channels": 32, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_sides": (4,)}
    >>> model = LayoutUNet(image_size=8, context_dim=24, **sizes)
    >>> model(torch.rand(2), torch.randn(2, 4, 8, 8), context=torch.randn(2, 7, 24)).shape
    torch.Size([2, 4, 8, 8])

    Source: arXiv 2112.10752, section 3.3 and appendix E.2.1.
    """

    family = "guided_diffusion_layout"
    sample_arguments = ("condition", "context")
    condition_argument = "context"
    needs_condition = True

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
        num_head_channels: int = -1,
        dropout: float = 0.0,
        conv_resample: bool = True,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = False,
        num_classes: int = 0,
        label_dropout: float = 0.0,
        context_dim: int = 512,
        transformer_depth: int = 1,
    ):
        require_count("context_dim", context_dim)
        require_count("transformer_depth", transformer_depth)
        self._build({name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def _attention(self, channels: int, num_heads: int) -> nn.Module:
        return SpatialTransformer(channels, self.config["context_dim"], num_heads, self.config["transformer_depth"])

    def forward(
        self,
        t: Tensor,
        z: Tensor,
        y: Tensor | None = None,
        condition: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """Velocity (B, C, H, W) as `UNet` gives it, under the context (B, L, D)."""
        return self.checked_velocity(t, z, y, condition, self._checked_context(context, z))

    def _checked_context(self, context: Tensor | None, z: Tensor) -> Tensor:
        width = self.config["context_dim"]
        if context is None:
            raise ValueError(f"this network needs a context (B, L, {width}), tokens of an encoder; give context.")
        require_tensors(z=z, context=context)
        if context.ndim != 3 or context.shape[2] != width or not context.is_floating_point():
            raise ValueError(
                f"context must be floating and (B, L, {width}), but is {context.dtype} {tuple(context.shape)}."
            )
        if context.shape[0] != z.shape[0]:
            raise ValueError(f"context holds {context.shape[0]} entries for {z.shape[0]} samples of z.")
        return context.to(self.out[2].weight.dtype)

    def one_sample(self) -> tuple[Tensor, ...]:
        return *super().one_sample(), torch.empty(1, _CONTEXT_TOKENS, self.config["context_dim"])
