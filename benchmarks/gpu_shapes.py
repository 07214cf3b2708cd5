"""The rows of the op table at the sizes of DiT-S, B, L and XL, of latents and of an autoencoder, and what is wanted.

As many samples as make a tensor several times a GPU's L2 cache; in a smoke run, two.
"""

from dataclasses import dataclass

import torch

BF16, F32 = torch.bfloat16, torch.float32
TOKENS = 256
WIDTHS = {"DiT-XL": 1152, "DiT-S": 384, "DiT-L": 1024, "DiT-B": 768}  # XL and S first: if time is short, these two
LATENT = (4, 32, 32)
TENSOR = 256 * 2**20  # bytes; the L2 cache of an H100 has 50 MB, of an H200 60


@dataclass(frozen=True)
class Case:
    """A row at a size (`Op.arguments`): wanted shares of the copy's rate forward and backward (None: the row has no
    backward of its own, or none is asked of it), `reads` as a factor of the row's own bytes, and launches of a call."""

    row: str
    title: str
    size: dict
    forward: float | None = None
    backward: float | None = None
    bytes_factor: float = 1.0
    launches: int | None = None


def cases(smoke: bool) -> list[Case]:
    """The most telling first."""
    found = [case for dtype in (BF16, F32) for width in WIDTHS for case in tokens(width, dtype, smoke)]
    # in training under bf16 the residual stream is float32
    found[3:3] = [case for width in ("DiT-XL", "DiT-S") for case in tokens(width, BF16, smoke, F32)]
    found += latents(smoke) + [case for dtype in (BF16, F32) for case in feature_maps(dtype, smoke)]
    return found[:3] + latents(smoke)[:2] if smoke else found


def name(dtype: torch.dtype) -> str:
    return {BF16: "bf16", F32: "fp32"}[dtype]


def samples(elements: int, dtype: torch.dtype, smoke: bool) -> int:
    """That make a tensor of TENSOR bytes, rounded up to whole 64."""
    return 2 if smoke else -(-TENSOR // (elements * dtype.itemsize) // 64) * 64 or 64


def tokens(network: str, dtype: torch.dtype, smoke: bool, state: torch.dtype | None = None) -> list[Case]:
    """state: of the residual stream, where it is not the others' dtype; the norms alone have one."""
    width = 64 if smoke else WIDTHS[network]
    shape = (samples(TOKENS * width, dtype, smoke), TOKENS, width)
    wide = (samples(TOKENS * 4 * width, dtype, smoke), TOKENS, 4 * width)
    norm, title = {"shape": shape, "dtype": dtype, "state": state or dtype}, f"{network} {name(dtype)}"
    title += "" if state is None else f", {name(state)} state"
    norms = [Case(row, title, norm, 0.9, 0.8) for row in ("modulated_layer_norm", "gated_residual_norm")]
    gelu = Case("gelu_tanh", title, {"shape": wide, "dtype": dtype}, 0.9, 0.9)
    return [*norms, gelu] if state is None else norms


def latents(smoke: bool) -> list[Case]:
    """States in float32, as solvers and losses have them; the velocity in both."""
    shape = (samples(4096, F32, smoke), *LATENT)
    return [
        Case("interpolate", "noise from the counter", {"shape": shape, "noise": True}, 0.85, launches=1),
        Case("guided_step", "guided, bf16 velocity", {"shape": shape, "dtype": BF16}, 0.85, launches=1),
        Case("guided_step", "guided, 3 stored", {"shape": shape, "num_stored": 3}, 0.85, launches=1),
        Case("interpolate", "noise given", {"shape": shape}, 0.85, launches=1),
        *(Case("velocity_loss", name(d), {"shape": shape, "dtype": d}, 0.85, launches=1) for d in (BF16, F32)),
        Case("posterior_interpolate", "bf16 table", {"shape": shape, "dtype": BF16}),
        Case("philox_normal", "16384 samples", {"shape": (shape[0], 4096)}),
    ]


def feature_maps(dtype: torch.dtype, smoke: bool) -> list[Case]:
    """Of sd-vae's decoder and of ADM; reading twice and writing once is what a norm has to do beyond the cache."""
    found = []
    for where, channels, side in (("VAE 256 px", 128, 256), ("VAE 64 px", 512, 64), ("ADM 32 px", 256, 32)):
        for layout in ("channels_last", "contiguous"):
            shape = (samples(channels * side * side, dtype, smoke), channels, *(4 if smoke else side,) * 2)
            size = {"shape": shape, "num_groups": 32, "dtype": dtype, "parameters": F32, "layout": layout}
            title = f"{where} {name(dtype)} {layout.replace('_', ' ')}"
            found.append(Case("group_norm_silu", title, size, 0.9, None, bytes_factor=1.5))
    return found
