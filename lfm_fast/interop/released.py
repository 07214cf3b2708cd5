"""The layout of LFM's released weights: saved_info/latent_flow/<dataset>/<experiment>/model_<epoch>.pth."""

import os
import re
from pathlib import Path

import torch
from torch import nn

from lfm_fast.checkpoint import atomic_write
from lfm_fast.models import FAMILIES
from lfm_fast.models.conditioned import Conditioned

_EPOCH = re.compile(r"model_([0-9]+)\.pth")
_RESUMABLE = "content.pth"
_LISTED = 20  # experiments at most, in a sentence
# where experiments stand below a folder: of a data set, latent_flow, saved_info, the one that holds it. No other is
# looked into, however many there are
_BELOW = ("*", "*/*", "latent_flow/*/*", "saved_info/latent_flow/*/*")


def find_weights(folder: str | os.PathLike) -> Path | None:
    """The weights that a folder of LFM's stands for, None where it holds none.

    An experiment's folder stands for its `model_<epoch>.pth` of the highest epoch, or else its `content.pth`; a folder
    further up, `saved_info` or the one that holds it among them, for that of the one experiment below it.

    Raises ValueError, listing them, where there are several experiments.
    """
    folder = Path(folder)
    own = _newest(folder)
    if own is not None:
        return own
    files = [path for below in _BELOW for path in folder.glob(f"{below}/*.pth")]
    experiments = sorted({path.parent for path in files if _EPOCH.fullmatch(path.name) or path.name == _RESUMABLE})
    if len(experiments) > 1:
        names = [path.relative_to(folder).as_posix() for path in experiments]
        rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        listed = ", ".join(names[:_LISTED])
        raise ValueError(f"{folder} holds {len(names)} experiments; give the folder of one: {listed}{rest}")
    return _newest(experiments[0]) if experiments else None


def save_released(model: nn.Module, place: str | os.PathLike, epoch: int = 0, *, prefix: str = "") -> Path:
    """Write a network's weights as LFM does, a plain state dict in float32; returns the file.

    model: one of the networks of `create_model` that LFM has. place: a `.pth` file, or the folder
    of an experiment, which gets `model_<epoch>.pth`. prefix: "module." as of a network trained on several devices.

    Raises ValueError for a network that LFM does not have, OSError where `place` cannot be written.

    >>> import tempfile
    >>> model = lfm_fast.DiT(image_size=8, hidden_size=32, depth=1, num_heads=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_released(model, folder, epoch=475).name
    'model_475.pth'
    """
    if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
        raise ValueError(f"epoch is {epoch!r}, expected a number from 0 on.")
    _require_lfms(model)
    place = Path(place)
    path = place if place.suffix == ".pth" else place / f"model_{epoch}.pth"
    weights = {
        prefix + name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else None).contiguous()
        for name, tensor in model.state_dict().items()
    }
    with atomic_write(path) as temporary:
        torch.save(weights, temporary)
    return path


def _newest(folder: Path) -> Path | None:
    epochs = [(int(match[1]), path) for path in folder.glob("*.pth") if (match := _EPOCH.fullmatch(path.name))]
    if epochs:
        return max(epochs)[1]
    return folder / _RESUMABLE if (folder / _RESUMABLE).is_file() else None


def _require_lfms(model) -> None:
    config = getattr(model, "config", None)
    family = config.get("family") if isinstance(config, dict) else None
    if family in (None, Conditioned.family) or type(model) is not FAMILIES.get(family):
        inside = "; give its .network" if isinstance(getattr(model, "network", None), nn.Module) else ""
        raise ValueError(f"LFM's files hold one of its networks, and a {type(model).__name__} is none of them{inside}.")
    if config.get("qk_norm"):
        raise ValueError("LFM's DiT has no qk_norm, which this network was built with.")
