"""Which U-Net a state dict without a configuration belongs to: a released one exactly, or what is left to be told.

Keys and shapes of a U-Net tell its sizes, but not what it does with them: into how many heads its attention splits its
channels and in which order they stand, the side of the latents it was trained on. Only of LFM's released networks all
is known, so those are recognised, each by every key and shape, and no other is guessed.
"""

import re

import torch
from torch import nn

from lfm_fast.models.registry import NETWORKS
from lfm_fast.models.shapes import Shapes, differences, how_many_differ, shapes_of

# LFM's released networks and those of its two tasks: what is behind each manifest of its checkpoints
RELEASED = (
    ("adm-original-celeba256", {}),
    ("adm-original-celeba512", {"image_size": 64}),
    ("adm-original", {}),  # LSUN church
    ("adm-original", {"in_channels": 9, "out_channels": 4}),  # inpainting: latents, masked latents, mask
    ("adm-original", {"in_channels": 8, "out_channels": 4}),  # semantic synthesis: latents, encoded label map
    ("adm", {}),  # FFHQ, LSUN bedroom
    ("adm", {"num_classes": 1000, "label_dropout": 0.1}),  # ImageNet
)

# what keys and shapes of each kind do not tell
_UNTOLD = {
    "adm-original": ("num_heads (or num_head_channels)", "use_new_attention_order", "dropout", "image_size"),
    "adm-layout": ("num_heads (or num_head_channels)", "dropout", "image_size"),
    "adm": ("dropout",),
    "ddpm++": ("dropout", "resample_filter"),
    "ncsn++": ("dropout", "resample_filter"),
}


def released_unet(shapes: Shapes) -> nn.Module | None:
    """The released network, on the meta device, whose state dict has exactly these keys and shapes, or None."""
    if _kind(shapes) is None:
        return None
    for name, arguments in RELEASED:
        model = _built(name, arguments)
        if _has(model, shapes):
            return model
    return None


def what_is_untold(shapes: Shapes) -> str:
    """What has to be told of the U-Net with these weights, in one sentence; "" where they are no U-Net's known here."""
    kind = _kind(shapes)
    if kind is None:
        return ""
    known = None
    try:
        candidates = _guided(shapes, kind) if kind.startswith("adm-") else [_of_edm(shapes, kind)]
        known = next((known for known in candidates if _has(_built(kind, known), shapes)), None)
    except (KeyError, ValueError, IndexError, ZeroDivisionError):
        pass  # some weights are missing, or others' are among them
    nearest = _nearest_released(shapes, kind) if known is None else ""
    untold = [*_UNTOLD[kind], *(["label_dropout"] if known is None or known.get("num_classes") else [])]
    listed = ", ".join(untold[:-1]) + (" and " if len(untold) > 1 else "") + untold[-1]
    return (
        f"these weights are of {kind} and none that was released{nearest}, and keys and shapes do not tell {listed}; "
        f"give the network as `model`, made by create_model({kind!r}, ...) with those and {_told(kind, known, listed)}"
    )


def _nearest_released(shapes: Shapes, kind: str) -> str:
    """The released network that these are but for a tenth of the keys at most, and how they differ; "" for none."""
    least, said = len(shapes) / 10, ""
    for name, arguments in RELEASED:
        if NETWORKS[name][0] is not NETWORKS[kind][0]:
            continue
        expected = shapes_of(_built(name, arguments).state_dict())
        if (count := how_many_differ(expected, shapes)) < least:
            settings = ", ".join(f"{argument}={value!r}" for argument, value in arguments.items())
            called = f"{name} with {settings}" if settings else name
            least, said = count, f" (the nearest that was is {called}; {differences(expected, shapes)})"
    return said


def _told(kind: str, known: dict | None, untold: str) -> str:
    """The sizes that are known as arguments of create_model, but for those that it takes by itself."""
    if known is None:
        return "its sizes"
    network, named = NETWORKS[kind]
    usual = {**(network.__init__.__kwdefaults__ or {}), **named, "out_channels": known["in_channels"]}
    told = {name: value for name, value in known.items() if name not in untold}
    if "image_size" in told:  # in pixels there
        told["image_size"] = usual["image_size"] = 8 * told["image_size"]
    told = {name: value for name, value in told.items() if name == "image_size" or value != _listed(usual[name])}
    rows = told.get("num_classes", 0) if kind.startswith("adm-") else 0  # one of which may be the null label's
    either = {"num_classes": f" ({rows - 1} with label_dropout)"} if rows > 1 else {}
    return ", ".join(f"{name}={value!r}{either.get(name, '')}" for name, value in told.items()) or "nothing else"


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def _kind(shapes: Shapes) -> str | None:
    if {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= shapes.keys():
        return "adm-layout" if any(".transformer_blocks." in name for name in shapes) else "adm-original"
    if {"map_layer0.weight", "map_layer1.weight"} <= shapes.keys():
        if not shapes.keys().isdisjoint(("out_norm.weight", "out_conv.weight")):
            return "adm"
        return "ncsn++" if any("aux_residual" in name for name in shapes) else "ddpm++"
    return None


def _built(name: str, arguments: dict) -> nn.Module:
    network, named = NETWORKS[name]
    with torch.device("meta"):
        return network(**{**named, **arguments})


def _has(model: nn.Module, shapes: Shapes) -> bool:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == shapes


def _guided(shapes: Shapes, kind: str):
    """Sizes of a U-Net of guided diffusion that may have these shapes, `num_heads` and `image_size` left open."""
    channels, in_channels = shapes["input_blocks.0.0.weight"][:2]
    sizes = {"in_channels": in_channels, "out_channels": shapes["out.2.weight"][0], "model_channels": channels}
    if "label_emb.weight" in shapes:
        sizes["num_classes"] = shapes["label_emb.weight"][0]
    if kind == "adm-layout":
        sizes["context_dim"] = shapes[_first(shapes, r".*\.attn2\.to_k\.weight")][1]
        sizes["transformer_depth"] = _count(shapes, r".*\.transformer_blocks\.(\d+)\..*")
    stages = _count(shapes, r"output_blocks\.(\d+)\..*")  # levels (num_res_blocks + 1)
    modulation, norm = (shapes[f"input_blocks.1.0.{name}.weight"][0] for name in ("emb_layers.1", "out_layers.0"))
    for blocks in range(1, stages):
        firsts = range(1, stages, blocks + 1)  # of every level's stages
        widths = [shapes.get(f"input_blocks.{first}.0.out_layers.0.weight", (0,))[0] for first in firsts]
        if stages % (blocks + 1) or 0 in widths:
            continue
        down = f"input_blocks.{blocks + 1}.0."
        yield {
            **sizes,
            "num_res_blocks": blocks,
            "channel_mult": [width // channels for width in widths],
            "attention_resolutions": [2**i for i, k in enumerate(firsts) if _attends(shapes, k)],
            "use_scale_shift_norm": modulation == 2 * norm,
            "resblock_updown": f"{down}in_layers.0.weight" in shapes,
            "conv_resample": len(widths) == 1 or f"{down}op.weight" in shapes or f"{down}in_layers.0.weight" in shapes,
            "num_heads": 1,
            "image_size": 2 ** len(widths),  # any
        }


def _attends(shapes: Shapes, stage: int) -> bool:
    return f"input_blocks.{stage}.1.norm.weight" in shapes


def _of_edm(shapes: Shapes, kind: str) -> dict:
    """Sizes of ADM, DDPM++ or NCSN++ of these shapes."""
    first = _first(shapes, r"enc\.(\d+)x\1_conv\.weight")
    side, width = int(first.split(".")[1].split("x")[0]), shapes["map_layer0.weight"][0]
    sides = sorted({int(n) for n in _numbers(shapes, r"enc\.(\d+)x.*_block0\..*")}, reverse=True)
    channels = width // 4
    blocks = {int(n) for n in _numbers(shapes, rf"enc\.{side}x{side}_block(\d+)\..*")}
    last = "out_conv.weight" if kind == "adm" else f"dec.{side}x{side}_aux_conv.weight"
    sizes = {
        "image_size": side,
        "in_channels": shapes[first][1],
        "out_channels": shapes[last][0],
        "model_channels": channels,
        "channel_mult": [shapes[f"enc.{s}x{s}_block0.conv0.weight"][0] // channels for s in sides],
        "num_blocks": len(blocks),
        "attn_resolutions": [s for s in sides if f"enc.{s}x{s}_block0.qkv.weight" in shapes],
    }
    if "map_label.weight" in shapes:
        sizes["num_classes"] = shapes["map_label.weight"][1]
    if kind == "adm":
        return sizes
    taps = max((shape[-1] for name, shape in shapes.items() if name.endswith("resample_filter")), default=2)
    sizes["embedding_type"] = "fourier" if "map_noise.freqs" in shapes else "positional"
    sizes["channel_mult_noise"] = shapes["map_layer0.weight"][1] // channels
    return {**sizes, "resample_filter": [1] * taps}


def _first(shapes: Shapes, pattern: str) -> str:
    """The first key of this form; KeyError where there is none."""
    for name in shapes:
        if re.fullmatch(pattern, name):
            return name
    raise KeyError(pattern)


def _count(shapes: Shapes, pattern: str) -> int:
    """The highest number in keys of this form, and one; ValueError where there cannot be so many."""
    count = 1 + max(int(number) for number in _numbers(shapes, pattern))
    if count > len(shapes):
        raise ValueError(f"{count} is too many for {len(shapes)} weights")
    return count


def _numbers(shapes: Shapes, pattern: str) -> list[str]:
    return [match[1] for name in shapes if (match := re.fullmatch(pattern, name))]
