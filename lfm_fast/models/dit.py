"""DiT with adaLN-Zero: "Scalable Diffusion Models with Transformers" (arXiv 2212.09748), section 3."""

import contextlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfm_fast import ops
from lfm_fast.models import checkpointing
from lfm_fast.models.compiling import Compiled
from lfm_fast.models.layers import (
    Attention,
    HeadNorm,
    LabelEmbedding,
    Mlp,
    PatchEmbedding,
    TimeEmbedding,
    sincos_table,
)
from lfm_fast.models.prepared import MAX_BYTES, Prepared
from lfm_fast.models.velocity_network import (
    VelocityNetwork,
    check_channels,
    check_label_sizes,
    is_count,
    require_count,
)

_NORM_EPS = 1e-6


class DiTBlock(nn.Module):
    """Attention and MLP, each added to the tokens x (B, T, D) through a gate.

    A half block is branch -> x + gate branch -> modulated norm of that for the NEXT half, and the last two are one pass
    over the residual stream (ops.gated_residual_norm). So a block takes tokens that are normed already, h, and returns
    those that the next block, or the final layer, wants.
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, qk_norm: bool = False):
        super().__init__()
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.mlp = Mlp(hidden_size, mlp_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x: Tensor, h: Tensor, modulation: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
        """(x, h) -> (x, h), with this block's modulation (B, 6 D) and that of what follows it."""
        gate_mlp, (shift_next, scale_next, *_) = modulation.chunk(6, dim=-1)[5], following.chunk(6, dim=-1)
        x, branch = self.before_sum(x, h, modulation)
        return ops.gated_residual_norm(x, branch, gate_mlp, shift_next, scale_next, _NORM_EPS)

    def before_sum(self, x: Tensor, h: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor]:
        """(x, h) -> x with attention added, and the MLP's output, which is not added yet."""
        _, _, gate_attn, shift_mlp, scale_mlp, _ = modulation.chunk(6, dim=-1)
        x, h = ops.gated_residual_norm(x, self.attn(h), gate_attn, shift_mlp, scale_mlp, _NORM_EPS)
        return x, self.mlp(h)


def _call_block(block: DiTBlock, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    return block(*tensors)


class FinalLayer(nn.Module):
    """Linear read-out of normed tokens, (B, T, D) -> (B, T, p p C); its norm's shift and scale come from adaLN."""

    def __init__(self, hidden_size: int, out_features: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h)


class DiT(VelocityNetwork):
    """Diffusion transformer that returns the velocity: v = model(t, z, y).

    `image_size` is the side of the LATENT. t (B,) in [0, 1] is used raw, z is (B, C, H, W) in any floating dtype (it is
    cast to the weights'), y (B,) holds integer labels. With `num_classes` > 0 and `label_dropout` > 0 the label table
    has one more row, `null_label`, that means "no label"; dropping labels in training is the training loop's work.
    `y=None` means that row, or the table's last one where there is no null label. `num_classes=0` is an unlabelled
    network (one row). With `out_channels` below `in_channels` the rest of the input is a `condition` (`VelocityNetwork`
    says how it is given). `qk_norm=True` norms the queries and keys of every head, with learned scales
    (`layers.HeadNorm`).
    Returns (B, C, H, W) in the weights' dtype, or autocast's.

    Raises ValueError for sizes that do not divide, and for inputs of another shape than the network was made for.

    >>> model = DiT(image_size=8, hidden_size=32, depth=1, num_heads=2)
    >>> model(torch.rand(2), torch.randn(2, 4, 8, 8)).shape
    torch.Size([2, 4, 8, 8])

    Source: arXiv 2212.09748, section 3.2 (adaLN-Zero) and table 1 (sizes).
    """

    family = "dit"
    products = contextlib.nullcontext  # what the products of a forward run in (models/precision.py)
    _compiled_velocity = _compiled_block = _compiled_region = None

    def __init__(
        self,
        *,
        image_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        label_dropout: float = 0.0,
        qk_norm: bool = False,
        out_channels: int | None = None,
    ):
        config = {"image_size": image_size, "patch_size": patch_size, "in_channels": in_channels}
        config |= {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "mlp_ratio": mlp_ratio}
        config |= {"num_classes": num_classes, "label_dropout": label_dropout}
        config |= {"qk_norm": qk_norm} if qk_norm is not False else {}  # without, a configuration is as it always was
        config |= {"out_channels": out_channels}
        _check_config(config)
        super().__init__(config)
        self.patch_size, self.hidden_size = patch_size, hidden_size
        # Frozen, yet a parameter and not a buffer: the checkpoint format and its parameter counts have it so.
        self.pos_embed = nn.Parameter(sincos_table(image_size // patch_size, hidden_size), requires_grad=False)
        self.x_embedder = PatchEmbedding(patch_size, in_channels, hidden_size)
        self.t_embedder = TimeEmbedding(hidden_size)
        self.y_embedder = LabelEmbedding(self.num_labels, hidden_size)
        mlp_size = int(hidden_size * mlp_ratio)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_size, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * self.out_channels)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw fresh weights as published; every block starts as the identity and the velocity as zero (adaLN-Zero)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            if isinstance(module, HeadNorm):
                nn.init.ones_(module.weight)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))  # fans of the matrix product it is
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in [*(block.adaLN_modulation[1] for block in self.blocks), self.final_layer.adaLN_modulation[1]]:
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, t: Tensor, z: Tensor, y: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Velocity (B, C, H, W) at times t (B,) (or one time for all, ()), latents z (B, C, H, W) and labels y (B,)."""
        z = self.joined(z, condition)
        self.check_inputs(t, z, y)
        if y is None:
            y = torch.full((z.shape[0],), self.num_labels - 1, device=z.device)
        t = t.expand(z.shape[0])
        with self.products():
            if self._compiled_velocity is None:
                return self.velocity(t, z, y)
            # in one layout and in tensors of our own: a graph is made for strides, and marks those it is called with
            t, z, y = (x.contiguous().view(x.shape) for x in (t, z, y.long()))
            return self._compiled_velocity(self, t, z, y)

    def compile(self, part: str = "velocity", **options) -> None:
        """Compile in place, with torch.compile's options: "block" makes one small graph that all blocks share,
        "velocity" one of the whole network. Either serves batches of any size, labelled and unlabelled calls.

        Raises ValueError for another `part`. Copies of the network are not compiled.

        >>> model = DiT(image_size=8, hidden_size=32, depth=2, num_heads=2)
        >>> model.compile("block", backend="eager")
        >>> model(torch.rand(1), torch.randn(1, 4, 8, 8)).shape
        torch.Size([1, 4, 8, 8])
        """
        if part not in ("velocity", "block"):
            raise ValueError(f"part is {part!r}, expected 'velocity' or 'block'.")
        self._compiled_velocity = self._compiled_block = self._compiled_region = None
        if part == "velocity":
            self._compiled_velocity = Compiled(type(self).velocity, **options)
        else:
            self._compiled_block = Compiled(_call_block, **options)
            self._compiled_region = Compiled(checkpointing.region, **options)

    def velocity(self, t: Tensor, z: Tensor, y: Tensor) -> Tensor:
        """The network proper, all inputs explicit: compile this and labelled and unlabelled calls share one graph."""
        return self.trunk(self.tokens(z), self.modulations(t, y))

    def tokens(self, z: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> tokens with their positions (B, T, D): what needs neither time nor label."""
        return self.x_embedder(z, self.pos_embed)

    def modulations(self, t: Tensor, y: Tensor) -> list[Tensor]:
        """Shift, scale and gate of every half block at times t (B,) and labels y (B,): what does not need z.

        (B, 6 D) for each block, and (B, 6 D) for the final layer: shift, scale and zeros.
        """
        c = self.t_embedder(t) + self.y_embedder(y)  # (B, D)
        modulations = [block.adaLN_modulation(c) for block in self.blocks]  # per sample, never per token
        # the last norm has no gate; padded, it looks to a compiled block like what follows any other
        return [*modulations, F.pad(self.final_layer.adaLN_modulation(c), (0, 4 * self.hidden_size))]

    def trunk(self, x: Tensor, modulations: Sequence[Tensor]) -> Tensor:
        """Velocity (B, C, H, W) of tokens x (B, T, D) under modulations as `modulations` returns them."""
        mode = self.activation_checkpointing
        if mode != "none" and torch.is_grad_enabled():
            network = list(self.blocks), self.final_layer
            y = checkpointing.through_blocks(*network, x, modulations, mode, _NORM_EPS, self._compiled_region)
            return self._unpatchify(y)
        shift, scale, *_ = modulations[0].chunk(6, dim=-1)
        h, run = ops.modulated_layer_norm(x, shift, scale, _NORM_EPS), self._compiled_block or _call_block
        for block, modulation, following in zip(self.blocks, modulations, modulations[1:]):
            x, h = run(block, x, h, modulation, following)
        return self._unpatchify(self.final_layer(h))

    @property
    def prepares(self) -> bool:
        """Whether `prepare` may stand for calls: not where a call is overridden, hooked or compiled as a whole."""
        published = type(self).forward is DiT.forward and type(self).velocity is DiT.velocity
        patched = {"forward", "velocity"} & vars(self).keys()
        compiled = self._compiled_velocity is not None or self._compiled_call_impl is not None
        return published and not (patched or self._forward_hooks or self._forward_pre_hooks or compiled)

    def prepare(
        self, times: Tensor, y: Tensor | None = None, *, unlabelled: bool = False, max_bytes: int = MAX_BYTES
    ) -> Prepared:
        """The sampling form: this network at times known beforehand, its adaLN layers out of the loop.

            prepared(k, z, y) = model(times[k], z, y)    up to rounding; without gradients for what times and y decide

        Args:
            times: (N,) floating, in the order in which they will be used.
            y: labels that will occur, any number of them, repeated or not; None where calls will bring none.
            unlabelled: calls without labels (y=None) will occur beside those with some.
            max_bytes: of the table of modulations and what it takes to compute it. A longer table is computed piece by
                piece, for as many times as fit (one at least), when a call comes to them.

        Returns a `Prepared`. It holds the weights of its time: prepare again after they have changed.

        Raises ValueError for times of another shape or type, and labels that the network does not have.

        >>> model = DiT(image_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=5, label_dropout=0.1)
        >>> times, z, y = torch.linspace(1, 0, 11), torch.randn(2, 4, 8, 8), torch.tensor([3, 1])
        >>> prepared = model.prepare(times, y)
        >>> torch.allclose(prepared(7, z, y), model(times[7], z, y), atol=1e-5)
        True

        Source: arXiv 2212.09748, figure 3: adaLN's MLP sees the time and the label, and not the tokens.
        """
        if times.ndim != 1 or not len(times) or not times.is_floating_point():
            raise ValueError(
                f"times must be floating and (N,), one time or more, but is {times.dtype} {tuple(times.shape)}."
            )
        if not is_count(max_bytes) or max_bytes < 1:
            raise ValueError(f"max_bytes must be a positive integer, but is {max_bytes!r}.")
        return Prepared(self, times, y, unlabelled, max_bytes)

    def flops_per_sample(self) -> int:
        """Floating-point operations of one forward on one sample: 2 per multiply-add of its matrix products."""
        config, tokens = self.config, self.pos_embed.shape[1]
        d, mlp_size = config["hidden_size"], self.blocks[0].mlp.fc1.out_features
        patch, read_out = (self.patch_size**2 * channels for channels in (self.in_channels, self.out_channels))
        block = tokens * (4 * d * d + 2 * d * mlp_size) + 2 * tokens * tokens * d + 6 * d * d
        embeddings = tokens * patch * d + self.t_embedder.width * d + d * d
        return 2 * (embeddings + config["depth"] * block + 2 * d * d + tokens * d * read_out)

    def _unpatchify(self, x: Tensor) -> Tensor:
        side, p = self.image_size // self.patch_size, self.patch_size
        x = x.unflatten(-1, (p, p, -1)).unflatten(1, (side, side))  # (B, row, column, p, q, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _check_config(config: dict) -> None:
    check_channels(config)
    for name in ("patch_size", "hidden_size", "depth", "num_heads"):
        require_count(name, config[name])
    if config["image_size"] % config["patch_size"]:
        raise ValueError(
            f"the latent's side {config['image_size']} is no multiple of patch_size {config['patch_size']}."
        )
    hidden_size, num_heads = config["hidden_size"], config["num_heads"]
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of num_heads {num_heads} and of 4.")
    mlp_ratio = config["mlp_ratio"]
    finite = is_count(mlp_ratio) or (isinstance(mlp_ratio, float) and math.isfinite(mlp_ratio))
    if not finite or hidden_size * mlp_ratio < 1:
        raise ValueError(f"mlp_ratio must be positive, 1 / hidden_size or more, but is {mlp_ratio!r}.")
    check_label_sizes(config["num_classes"], config["label_dropout"])
    if not isinstance(config.get("qk_norm", False), bool):
        raise ValueError(f"qk_norm must be True or False, but is {config['qk_norm']!r}.")
