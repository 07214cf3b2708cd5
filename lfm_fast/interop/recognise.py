"""Whose network a state dict belongs to, where keys and shapes tell; where they do not, what has to be said besides."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from lfm_fast.interop.dit import DiTVelocity
from lfm_fast.interop.sit import SiTVelocity
from lfm_fast.models.recognise import DiTShapes, dit_from_weights, foreign_parts, read_dit_shapes
from lfm_fast.models.shapes import shapes_of

_IMAGENET_ROWS = 1001  # of the label table of the published networks: 1000 classes and the null label

# keys that a network of each kind has, what to do with it
_OTHERS = {
    "diffusers' DiTTransformer2DModel": (
        ("transformer_blocks.0.norm1.emb.timestep_embedder.linear_1.weight", "pos_embed.proj.weight"),
        "load it with its from_pretrained and give lfm_fast.interop.diffusers.DiffusersVelocity the network and the "
        "scheduler, which tells what it predicts",
    ),
    "a UNet2DModel of diffusers": (
        ("conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight"),
        "load it with its from_pretrained and give lfm_fast.interop.diffusers.DiffusersVelocity the network and the "
        "scheduler, which tells what it predicts",
    ),
    "guided-diffusion's U-Net": (
        ("time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight"),
        "LFM, TorchCFM and guided-diffusion share it, with other times and predictions: lfm_fast.load_checkpoint takes "
        "LFM's, and others go into create_model('adm-original', ...) and an adapter, as of lfm_fast.interop.torchcfm",
    ),
    "EDM's U-Net": (
        ("map_layer0.weight", "map_layer1.weight"),
        "LFM and EDM share it, with other times and predictions: lfm_fast.load_checkpoint takes LFM's, and others are "
        "loaded in the class they were trained in",
    ),
}


@dataclass(frozen=True)
class Recognised:
    """What a state dict is certain to be.

    network: "DiT", or another kind in words. projects: those that may have trained it, of "lfm", "sit" and "dit"; one
    where it is certain, none where the network is not built here. label_rows: of its label table; learned_sigma: it
    returns twice the channels. missing: a sentence that says what keys and shapes do not tell, "" where nothing.
    """

    network: str
    projects: tuple[str, ...]
    label_rows: int | None
    learned_sigma: bool
    missing: str


def recognise(state_dict: Mapping[str, Tensor]) -> Recognised:
    """What keys and shapes of a state dict tell with certainty of the network and who trained it.

    LFM, SiT and DiT share one architecture and its names. Learned sigmas rule LFM out, and leave SiT and DiT; a label
    table of one row is LFM's alone; with neither it may be LFM's or a SiT built without sigmas.

    Raises ValueError for what is no state dict, and for networks that are none of those known here.

    >>> model = lfm_fast.DiT(image_size=8, hidden_size=32, depth=2, num_heads=2)
    >>> recognise(model.state_dict()).projects
    ('lfm',)
    """
    state_dict = _plain(state_dict)
    if foreign := foreign_parts(shapes_of(state_dict)):
        return Recognised("a descendant of DiT", (), None, False, f"{foreign}.")
    found = read_dit_shapes(shapes_of(state_dict))
    if found is not None:
        projects = _projects(found)
        return Recognised("DiT", projects, found.rows, found.learned_sigma, _missing(projects))
    for name, (keys, sentence) in _OTHERS.items():
        if all(key in state_dict for key in keys):
            return Recognised(name, (), None, False, f"these weights are of {name}: {sentence}.")
    raise ValueError(
        f"these weights belong to no network known here (their keys begin with {', '.join(list(state_dict)[:3])}); "
        "load them in the class they were trained in and wrap that."
    )


def from_state_dict(
    state_dict: Mapping[str, Tensor],
    project: str | None = None,
    *,
    num_classes: int | None = None,
    num_heads: int | None = None,
) -> nn.Module:
    """The velocity field of a DiT's weights: our network with a copy of them, converted as `project` needs it.

        "lfm"  the network as it is         "sit"  SiTVelocity of it          "dit"  DiTVelocity of it

    project may be left out where `recognise` is certain. Learned sigmas are cut off the last layer. num_classes: where
    the label table is neither of one row nor ImageNet's: its rows less one, the last meaning "no label", or all of them
    in a network without one. num_heads: where width and depth are of no published network. `lfm_fast.optimize` takes
    the result.

    Raises ValueError, naming what has to be told, where keys and shapes do not tell it; and for weights that are not
    exactly a DiT's.

    >>> weights = lfm_fast.DiT(image_size=8, hidden_size=32, depth=2, num_heads=2).state_dict()
    >>> field = from_state_dict(weights, "sit", num_heads=2)
    >>> lfm_fast.sample(field, torch.randn(2, 4, 8, 8), method="heun", num_steps=2).shape
    torch.Size([2, 4, 8, 8])

    Source: arXiv 2212.09748 (DiT), 2401.08740 (SiT), 2307.08698 (LFM).
    """
    found, state_dict = recognise(state_dict), _plain(state_dict)
    if not found.projects:
        raise ValueError(found.missing)
    if project is None:
        if len(found.projects) > 1:
            raise ValueError(found.missing)
        project = found.projects[0]
    if project not in ("lfm", "sit", "dit"):
        raise ValueError(f"project is {project!r}, expected 'lfm', 'sit' or 'dit'.")
    if project == "lfm" and found.learned_sigma:
        raise ValueError("these weights have learned sigmas, which no network of LFM has; project is 'sit' or 'dit'.")
    rows = found.label_rows
    if num_classes is None:
        if rows not in (1, _IMAGENET_ROWS):
            raise ValueError(
                f"the label table has {rows} rows, maybe {rows - 1} classes and a null label or {rows} classes without "
                "one; give num_classes."
            )
        num_classes = rows - 1
    model = dit_from_weights(state_dict, num_heads, num_classes).eval()
    if project == "lfm":
        return model
    return (SiTVelocity if project == "sit" else DiTVelocity)(model, null_label=model.null_label)


def _projects(found: DiTShapes) -> tuple[str, ...]:
    if found.learned_sigma:
        return ("sit", "dit")
    return ("lfm",) if found.rows == 1 else ("lfm", "sit")


def _missing(projects):
    if len(projects) == 1:
        return ""
    what = {
        ("sit", "dit"): "a DiT with learned sigmas: 'sit' if it predicts a velocity at times in [0, 1], 'dit' if noise "
        "at timesteps from 0 to 999",
        (
            "lfm",
            "sit",
        ): "a DiT without learned sigmas: 'lfm' if its time runs from data to noise, 'sit' if from noise to data",
    }[projects]
    return f"keys and shapes are those of {what}; give project='{projects[0]}' or '{projects[1]}'."


def _plain(state_dict) -> dict:
    """Names and tensors, without the prefix of training on several devices."""
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ValueError(f"expected a state dict, names and tensors, but this is a {type(state_dict).__name__}.")
    other = next((name for name, value in state_dict.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        nested = [name for name, value in state_dict.items() if isinstance(value, Mapping)]
        hint = f"; give one of its entries {', '.join(map(repr, nested))}" if nested else ""
        raise ValueError(f"expected a state dict, names and tensors, but {other!r} is no tensor{hint}.")
    prefix = "module." if all(name.startswith("module.") for name in state_dict) else ""
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
