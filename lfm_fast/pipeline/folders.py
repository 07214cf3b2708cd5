"""A flow on the disk: a folder in diffusers' layout, a training run's folder, or a file of weights."""

import json
import warnings
from pathlib import Path

from lfm_fast import __version__
from lfm_fast.autoencoder import DEFAULT_HUB_NAME, EMBEDDED_FOLDER, WEIGHTS_FILE, Autoencoder, load_autoencoder
from lfm_fast.checkpoint import (
    atomic_write,
    load_checkpoint,
    read_metadata,
    replace_files,
    run_checkpoints,
    save_weights,
)
from lfm_fast.flow.paths import Linear, describe, make_path
from lfm_fast.models import from_config

INDEX = "model_index.json"


def write(flow, folder, dtype):
    """model_index.json, transformer/ and vae/ of a `LatentFlow`, weights as `dtype`; what is there stays until then."""
    kind = type(flow.model).__name__
    index = {
        "_class_name": "LatentFlow",
        "_lfm_fast_version": __version__,
        "transformer": ["lfm_fast", kind],
        "vae": _component(flow.autoencoder.network),
        "path": describe(flow.path),
        "class_names": list(flow.class_names),
        "sampling": flow.sampling,
    }
    index |= {"task": flow.task} if flow.task else {}
    weights = {key: value.to(dtype) for key, value in flow.model.state_dict().items()}
    with replace_files(folder, last=INDEX) as temporary:
        save_weights(temporary / "transformer" / WEIGHTS_FILE, weights)
        _write_json(temporary / "transformer" / "config.json", {"_class_name": kind, **flow.model.config})
        flow.autoencoder.save_pretrained(temporary / "vae")
        _write_json(temporary / INDEX, index)


def read(source, autoencoder):
    """The arguments of a `LatentFlow` that stands at `source`, as `LatentFlow.from_pretrained` takes it."""
    folder = EMBEDDED_FOLDER if str(source) == "embedded" else Path(source).expanduser()
    if (folder / INDEX).is_file():
        return _from_folder(folder, autoencoder)
    if folder.is_dir():
        return _from_checkpoint(*_newest_whole(folder), autoencoder)
    return _from_checkpoint(folder, load_checkpoint(folder), autoencoder)


def _component(network):
    return [type(network).__module__.split(".")[0], type(network).__name__]


def _write_json(path, content):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _opened(autoencoder, otherwise):
    if isinstance(autoencoder, Autoencoder):
        return autoencoder
    return load_autoencoder(otherwise if autoencoder is None else autoencoder)


def _from_folder(folder, autoencoder):
    index = _read_json(folder / INDEX, "path", "class_names", "sampling")
    config = _read_json(folder / "transformer" / "config.json", "family")
    model = from_config({key: value for key, value in config.items() if not key.startswith("_")})
    model = load_checkpoint(folder / "transformer" / WEIGHTS_FILE, model)
    if autoencoder is None and not (folder / "vae").is_dir():
        raise ValueError(f"{folder} has no folder vae; give the autoencoder by name or folder")
    autoencoder = _opened(autoencoder, "embedded" if folder == EMBEDDED_FOLDER else folder / "vae")
    return _arguments(model, autoencoder, index)


def _read_json(path, *needed):
    """The object in a JSON file. Raises ValueError, naming the file, for anything else and where a name is missing."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; the folder is incomplete")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    missing = [name for name in needed if not isinstance(content, dict) or name not in content]
    if missing:
        raise ValueError(f"{path} holds no {', '.join(missing)}; save the flow again")
    return content


def _newest_whole(folder):
    """(path, network) of a run's newest checkpoint that can be read; each one passed over gets a warning."""
    files = run_checkpoints(folder)
    if not files:
        raise ValueError(
            f"{folder} holds neither {INDEX} nor a checkpoint of a training run (checkpoints/*.safetensors)"
        )
    for path in files:
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
    path, task = make_path(**recorded["path"]), recorded.get("task", {})  # older flows have no task of their own
    return {"model": model, "autoencoder": autoencoder, "path": path, **named, "task": task}
