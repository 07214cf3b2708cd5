"""Files of other projects as velocity fields of ours, which `lfm_fast.sample` takes and `LatentFlow` saves."""

import os
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lfm_fast.checkpoint import load_checkpoint, read_state_dict
from lfm_fast.interop.diffusers import DiffusersVelocity
from lfm_fast.interop.discrete import DiscretePath
from lfm_fast.interop.dit import DiTVelocity
from lfm_fast.interop.folder import read_json
from lfm_fast.interop.recognise import from_state_dict, recognise
from lfm_fast.interop.released import find_weights
from lfm_fast.interop.sit import turned
from lfm_fast.models.recognise import dit_from_weights, read_dit_shapes
from lfm_fast.models.shapes import shapes_of

PROJECTS = ("lfm", "sit", "dit", "diffusers")

_SIGMAS = "its learned sigmas, the second half of what it returns, are dropped: a velocity has none"
_TURNED = "its time ran from noise to data; turned round in the weights, it is a network of ours like any other"
_NOISE = "it predicts {} at the steps of a table; an adapter makes velocities of it, on the table's own path"
_ALIGNED = (
    "its times are embedded with DiT's frequencies (downscale_freq_shift 0), which diffusers' files cannot say: right "
    "for weights that came from DiT, off by some 2.5e-3 for a network that diffusers itself trained"
)


@dataclass(frozen=True)
class Converted:
    """A velocity field of ours, and in sentences what became of it on the way.

    field: a network of ours or, for what predicts no velocity, `DiTVelocity` about one.
    """

    field: nn.Module
    notes: tuple[str, ...]


def convert(
    source: str | os.PathLike,
    project: str,
    *,
    weights: str = "ema",
    num_classes: int | None = None,
    num_heads: int | None = None,
) -> Converted:
    """Read another project's file or folder as a velocity field of ours: velocity (B, C, H, W) = field(t, z, y).

        "lfm"        a state dict, model_<epoch>.pth, content.pth or a folder of them      a network of ours
        "sit"        a state dict, or a training checkpoint of SiT's                        the same, its time turned
        "dit"        the same of DiT's                                                      DiTVelocity of a network
        "diffusers"  a folder with a DiTTransformer2DModel and, perhaps, its scheduler      either, as that predicts

    Everything is read in float32. weights: "ema" or "model", of files that hold both. num_classes, num_heads: where the
    label table or the width leaves them open, as in `from_state_dict`.

    Raises ValueError for files that are none of these, and for networks that ours cannot stand for, naming why.

    >>> import tempfile
    >>> model = lfm_fast.DiT(image_size=8, hidden_size=32, depth=1, num_heads=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"ema": model.state_dict(), "opt": {}}, f"{folder}/0400000.pt")
    ...     field = convert(f"{folder}/0400000.pt", "sit", num_heads=2).field
    >>> type(field).__name__
    'DiT'

    Source: arXiv 2307.08698 (LFM), 2401.08740 (SiT), 2212.09748 (DiT); diffusers' documentation.
    """
    if project not in PROJECTS:
        raise ValueError(f"project is {project!r}, expected one of {', '.join(PROJECTS)}.")
    source = Path(source).expanduser()
    if project == "diffusers":
        return _from_diffusers(source, num_classes)
    source = (find_weights(source) if source.is_dir() else None) or source
    state_dict, config, hints = read_state_dict(source, weights)
    if config is not None:
        raise ValueError(f"{source} is a file of lfm_fast's own, which is loaded as it is and needs no conversion.")
    if project == "lfm" and read_dit_shapes(shapes_of(state_dict)) is None:
        return Converted(load_checkpoint(source), ())
    state_dict = {name: x.float() if x.is_floating_point() else x for name, x in state_dict.items()}
    try:
        found = recognise(state_dict)
        told = hints.get("num_classes")  # by the file itself
        if num_classes is None and isinstance(told, int) and found.label_rows in (told, told + 1):
            num_classes = told
        field = from_state_dict(state_dict, project, num_classes=num_classes, num_heads=num_heads)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    sigmas = (_SIGMAS,) if found.learned_sigma else ()
    if project == "sit":
        return Converted(turned(field.network), (*sigmas, _TURNED))
    return Converted(field, (*sigmas, _NOISE.format("noise")) if project == "dit" else ())


def _transformer_folder(folder: Path) -> Path | None:
    """Where in a folder of diffusers a DiTTransformer2DModel stands, None where in none."""
    for place in (folder, folder / "transformer"):
        if (place / "config.json").is_file():
            return place if read_json(place / "config.json").get("_class_name") == _CLASS else None
    return None


_CLASS = "DiTTransformer2DModel"


def _from_diffusers(folder: Path, num_classes: int | None) -> Converted:
    import diffusers

    place = _transformer_folder(folder)
    if place is None:
        raise ValueError(f"{folder} holds no {_CLASS}, the one network of diffusers that is one of ours.")
    try:
        transformer = diffusers.DiTTransformer2DModel.from_pretrained(
            place, local_files_only=True, low_cpu_mem_usage=False
        )
        scheduler = _scheduler(place.parent / "scheduler") if place != folder else None
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} does not load in diffusers: {str(error).splitlines()[0]}") from error
    field = DiffusersVelocity(transformer.float(), scheduler)
    if field.scale not in (None, 1):
        raise ValueError(
            f"{folder}: its times run to {field.scale}, and ours to 1, which no weights make up for; sample it as it "
            "is, in lfm_fast.interop.diffusers.DiffusersVelocity with its scheduler."
        )
    state_dict, num_heads = field.weights()
    model = dit_from_weights(state_dict, num_heads, num_classes).eval()
    sigmas = (_SIGMAS,) if transformer.out_channels == 2 * model.out_channels else ()
    if not isinstance(field.path, DiscretePath):
        return Converted(model, (*sigmas, _ALIGNED))
    table = field.path.alphas_cumprod
    noise = DiTVelocity(model, alphas_cumprod=table, predicts=field.predicts, null_label=model.null_label)
    return Converted(noise, (*sigmas, _ALIGNED, _NOISE.format(field.predicts)))


def _scheduler(folder: Path):
    import diffusers

    if not folder.is_dir():
        return None
    name = read_json(folder / "scheduler_config.json").get("_class_name")
    if not isinstance(name, str) or not hasattr(diffusers, name):
        raise ValueError(f"{folder} names no scheduler of diffusers, but {name!r}.")
    return getattr(diffusers, name).from_pretrained(folder, local_files_only=True)
