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


def read(source, autoencoder):
    """The arguments of a `LatentFlow` that stands at `source`, as `LatentFlow.from_pretrained` takes it."""
    folder = EMBEDDED_FOLDER if str(source) == "embedded" else Path(source).expanduser()
    if (folder / INDEX).is_file():
        return _from_folder(folder, autoencoder)
    if folder.is_dir() and run_checkpoints(folder):
        return _from_checkpoint(*_newest_whole(folder), autoencoder)
    folder = _lfms(folder) if folder.is_dir() else folder
    return _from_checkpoint(folder, load_checkpoint(folder), autoencoder)


def _opened(autoencoder, otherwise):
    if isinstance(autoencoder, Autoencoder):
        return autoencoder
    return load_autoencoder(otherwise if autoencoder is None else autoencoder)


def _from_folder(folder, autoencoder):
    index = read_json(folder / INDEX, "path", "class_names", "sampling")
    model = read_network(folder, index)
    if autoencoder is None and not (folder / "vae").is_dir():
        raise ValueError(f"{folder} has no folder vae; give the autoencoder by name or folder")
    autoencoder = _opened(autoencoder, "embedded" if folder == EMBEDDED_FOLDER else folder / "vae")
    return _arguments(model, autoencoder, index)


def _lfms(folder):
    """The file of LFM's that a folder stands for."""
    found = find_weights(folder)
    if found is None:
        raise ValueError(
            f"{folder} holds neither {INDEX} nor a checkpoint of a training run (checkpoints/*.safetensors) nor one of "
            "LFM's (model_<epoch>.pth)"
        )
    return found


def _newest_whole(folder):
    """(path, network) of a run's newest checkpoint that can be read; each one passed over gets a warning."""
    for path in run_checkpoints(folder):
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            damage = error
            warnings.warn(f"skipping a checkpoint that cannot be read ({error})", stacklevel=4)
    raise ValueError(f"{folder}: none of its checkpoints can be read ({damage})")


def _from_checkpoint(path, model, autoencoder):
    recorded = read_metadata(path).get("flow") if path.suffix == ".safetensors" else None
    if recorded is None:  # weights alone, LFM's among them: the paper's path and autoencoder
        return {
            "model": model,
            "autoencoder": _opened(autoencoder, DEFAULT_HUB_NAME),
            "path": Linear(sigma_min=1e-5),
        }
    return _arguments(model, _opened(autoencoder, recorded["autoencoder"]), recorded)


def _arguments(model, autoencoder, recorded):
    named = {name: recorded[name] for name in ("class_names", "sampling")}
    path = model.path if recorded["path"] is None else make_path(**recorded["path"])  # None: an adapter's own
    task = recorded.get("task", {})  # older flows have no task of their own
    return {"model": model, "autoencoder": autoencoder, "path": path, **named, "task": task}
