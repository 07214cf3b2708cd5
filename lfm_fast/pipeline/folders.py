"""A flow on the disk: a folder in diffusers' layout, a training run's folder, or a file of weights."""

import warnings
from pathlib import Path

from lfm_fast import __version__
from lfm_fast.autoencoder import DEFAULT_HUB_NAME, EMBEDDED_FOLDER, Autoencoder, load_autoencoder
from lfm_fast.checkpoint import load_checkpoint, read_metadata, replace_files, run_checkpoints
from lfm_fast.flow.paths import Linear, describe, make_path
from lfm_fast.interop.folder import component, prepare_network, read_json, read_network, write_json, write_network
from lfm_fast.interop.released import find_weights

INDEX = "model_index.json"


def write(flow, folder, dtype, as_diffusers=False):
    """model_index.json, the network's folder and vae/ of a `LatentFlow`, weights as `dtype`; what is there stays until
    then."""
    name, network, entries = prepare_network(flow.model, as_diffusers)
    index = {
        "_class_name": "LatentFlow",
        "_lfm_fast_version": __version__,
        **entries,
        "vae": component(flow.autoencoder.network),
        "path": None if "adapter" in entries else describe(flow.path),
        "class_names": list(flow.class_names),
        "sampling": flow.sampling,
    }
    index |= {"task": flow.task} if flow.task else {}
    with replace_files(folder, last=INDEX) as temporary:
        write_network(temporary / name, network, dtype)
        flow.autoencoder.save_pretrained(temporary / "vae")
        write_json(temporary / INDEX, index)


def read(source, autoencoder, model=None):
    """The arguments of a `LatentFlow` that stands at `source`, as `LatentFlow.from_pretrained` takes them."""
    model, recorded, its_own = _read(source, model)
    if autoencoder is None and isinstance(its_own, Path) and not its_own.is_dir():
        raise ValueError(f"{its_own.parent} has no folder vae; give the autoencoder by name or folder")
    if not isinstance(autoencoder, Autoencoder):
        autoencoder = load_autoencoder(its_own if autoencoder is None else autoencoder)
    named = {name: recorded[name] for name in ("class_names", "sampling")}
    named["task"] = recorded.get("task", {})  # older flows have no task of their own
    return {"model": model, "autoencoder": autoencoder, "path": _path(model, recorded), **named}


def read_network_of(source, model=None):
    """(network, path) of what `read` reads, whose autoencoder is not looked for."""
    model, recorded, _ = _read(source, model)
    return model, _path(model, recorded)


def _read(source, model=None):
    """(network, what is recorded beside it, its autoencoder's name or folder)."""
    folder = EMBEDDED_FOLDER if str(source) == "embedded" else Path(source).expanduser()
    if model is not None and (folder / INDEX).is_file():
        raise ValueError(f"{folder} says itself which network it holds; leave model out")
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX, "path", "class_names", "sampling")
        return read_network(folder, index), index, "embedded" if folder == EMBEDDED_FOLDER else folder / "vae"
    if folder.is_dir() and run_checkpoints(folder):
        path, model = _newest_whole(folder, model)
    else:
        path = _lfms(folder) if folder.is_dir() else folder
        model = load_checkpoint(path, model)
    recorded = read_metadata(path).get("flow") if path.suffix == ".safetensors" else None
    if recorded is None:  # weights alone, LFM's among them: the paper's path and autoencoder
        recorded = {"path": describe(Linear(sigma_min=1e-5)), "class_names": (), "sampling": {}}
    return model, recorded, recorded.get("autoencoder", DEFAULT_HUB_NAME)


def _path(model, recorded):
    return model.path if recorded["path"] is None else make_path(**recorded["path"])  # None: an adapter's own


def _lfms(folder):
    """The file of LFM's that a folder stands for."""
    found = find_weights(folder)
    if found is None:
        runs = sorted(each.parent.name for each in Path(folder).glob("*/checkpoints"))
        raise ValueError(
            f"{folder} holds neither {INDEX} nor a checkpoint of a training run (checkpoints/*.safetensors) nor one of "
            "LFM's (model_<epoch>.pth)" + (f"; runs lie in it: give {Path(folder) / runs[-1]}" if runs else "")
        )
    return found


def _newest_whole(folder, model=None):
    """(path, network) of a run's newest checkpoint that can be read; each one passed over gets a warning."""
    for path in run_checkpoints(folder):
        try:
            return path, load_checkpoint(path, model)
        except ValueError as error:
            damage = error
            warnings.warn(f"skipping a checkpoint that cannot be read ({error})", stacklevel=4)
    raise ValueError(f"{folder}: none of its checkpoints can be read ({damage})")
