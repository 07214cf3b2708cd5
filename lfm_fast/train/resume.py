"""Stopping and going on: run folders, training checkpoints, and which of them to continue from.

A checkpoint is one safetensors file, `checkpoints/0050000.safetensors`, with the tensors `model.*`, `ema.*` and
`optimizer.*` and JSON metadata. It is written under another name and renamed, so the folder holds only whole ones.
"""

import contextlib
import errno
import json
import os
import re
import warnings
from pathlib import Path

from safetensors import SafetensorError

from lfm_fast.checkpoint import (
    atomic_write,
    checksum,
    read_metadata,
    read_weights,
    remove_leftovers,
    run_checkpoints,
    save_weights,
)
from lfm_fast.train.journal import read_metrics
from lfm_fast.train.origin import difference

try:
    import fcntl  # not on Windows, where run folders are not locked
except ImportError:
    fcntl = None

FORMAT_VERSION = 1
UNREADABLE = (OSError, SafetensorError, ValueError, KeyError)  # what a damaged file can raise while it is read


# --- one checkpoint ---


def checkpoint_path(folder, step):
    return Path(folder) / "checkpoints" / f"{step:07d}.safetensors"


def save_checkpoint(folder, state, config):
    """Write the whole state. Raises OSError with one sentence if it cannot; nothing of it then stays behind."""
    path = checkpoint_path(folder, state.step)
    tensors = {f"model.{key}": value for key, value in state.model.state_dict().items()}
    tensors |= {f"ema.{key}": value for key, value in state.ema.average.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    metadata = {
        "config": state.model.config,
        "training": config.as_dict(),
        "flow": state.flow,
        "origin": state.origin,
        "version": FORMAT_VERSION,
        "step": state.step,
        "samples": state.samples,
        "loss_sum": float(state.loss_sum),
        "loss_steps": state.loss_steps,
        "checksum": checksum(tensors),
    }
    try:
        save_weights(path, tensors, metadata)
    except OSError as error:
        raise OSError(f"{error}; the checkpoints before it are whole") from error
    return path


def restore(path, state, world):
    """Put a checkpoint into `state`. Raises ValueError if it belongs to another network."""
    tensors, metadata = read_verified(path)
    if metadata["config"] != state.model.config:
        raise ValueError(
            f"{path} holds the network {metadata['config']}, but the settings ask for {state.model.config}; "
            "give the same --model, --image-size, --num-classes and --label-dropout, or --resume never"
        )
    state.model.load_state_dict(_under("model.", tensors))
    state.ema.average.load_state_dict(_under("ema.", tensors))
    for name, parameter in state.model.named_parameters():
        kept = _under(f"optimizer.{name}.", tensors)
        # the step count stays where a new optimizer would have it: on the CPU unless the optimizer is fused on CUDA
        fused = state.optimizer.defaults.get("fused")
        homes = {key: "cpu" if key == "step" and not fused else parameter.device for key in kept}
        if kept:
            state.optimizer.state[parameter] = {key: value.to(homes[key]) for key, value in kept.items()}
    state.renew_copies()
    state.step, state.samples = metadata["step"], metadata["samples"]
    # the losses not yet logged, summed over ranks, go on with rank 0
    state.loss_sum.fill_(metadata["loss_sum"] if world.is_main else 0.0)
    state.loss_steps = metadata["loss_steps"]


def warn_of_another_unit(path, autoencoder):
    """A checkpoint of a version that did not say what a run learns from is of one that did not look at latents_std."""
    if read_metadata(path).get("origin") is None and getattr(autoencoder, "latents_std", None) is not None:
        warnings.warn(
            f"{path} is of an older version, which ignored the latents_mean and latents_std of {autoencoder.name}: "
            "the latents have another unit now, and the curve may leap; to begin anew, give --resume never",
            stacklevel=2,
        )


def read_verified(path):
    """(tensors, metadata) of a training checkpoint. Raises one of UNREADABLE if a byte of it is wrong."""
    tensors, metadata = read_weights(path, verify=True)
    missing = sorted({*_METADATA} - {*metadata})
    if missing:
        raise ValueError(f"{path} is no training checkpoint: its metadata lacks {', '.join(missing)}")
    wrong = [name for name, kind in _METADATA.items() if not isinstance(metadata[name], kind)]
    if wrong:
        raise ValueError(f"{path} is no training checkpoint: its {wrong[0]} is {metadata[wrong[0]]!r}")
    if metadata["version"] > FORMAT_VERSION:
        raise ValueError(f"{path} has format version {metadata['version']}; this lfm_fast reads up to {FORMAT_VERSION}")
    return tensors, metadata


_METADATA = {"config": dict, "training": dict, "loss_sum": (int, float)}
_METADATA |= dict.fromkeys(("version", "step", "samples", "loss_steps", "checksum"), int)


def _under(prefix, tensors):
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


# --- a folder of them ---


def newest_step(folder):
    return max((int(path.stem) for path in run_checkpoints(folder)), default=0)


def keep_newest(folder, count, step):
    """Of the checkpoints up to `step`, the one just written, delete all but the `count` newest.

    One of a later step is damaged, or the run would have gone on from it; counted, it would displace a whole one.
    """
    made = [path for path in run_checkpoints(folder) if int(path.stem) <= step]
    for path in made[count:]:
        path.unlink(missing_ok=True)


def newest_whole(paths, say):
    """The first of `paths` that reads without fault, or None; each one passed over gets a sentence."""
    for path in paths:
        try:
            read_verified(path)
        except UNREADABLE as error:
            say(f"Skipping {path}, which cannot be read ({error}).")
        else:
            return path
    return None


# --- run folders ---


def new_run(output, model):
    """Make and return `output/NNN-model`. mkdir is atomic, so two runs starting together never share a folder."""
    output = Path(output).expanduser()
    output.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [int(path.name[:3]) for path in output.iterdir() if re.match(r"\d{3}-", path.name)]
        folder = output / f"{max(numbers, default=-1) + 1:03d}-{model.replace('/', '-')}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder


def lock(folder):
    """Hold the run folder for this process until it ends, however it ends. False if another process holds it.

    Raises PermissionError, a sentence, if this process may not write there."""
    refused = f"{folder} cannot be written"  # somebody else's, or on a disk that is read only
    if not os.access(folder, os.W_OK):
        raise PermissionError(refused)
    if fcntl is None:
        return True
    try:
        file = os.open(Path(folder) / ".lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise  # a full disk will have room again: no reason to begin at step 0
        raise PermissionError(refused) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    _HELD[str(folder)] = file
    return True


def unlock(folder):
    file = _HELD.pop(str(folder), None)
    if file is not None:
        os.close(file)


_HELD = {}  # folder -> the open file whose lock ends when it is closed


def choose_run(config, total_steps, origin=None):
    """Where to write and what to go on from: (run folder, checkpoint paths to try newest first). Locks the folder.

    `origin` is what this run learns from: one that learned from anything else is not gone on with, and named if it was
    asked for.
    """
    if config.resume not in ("auto", "never"):
        return _named_run(config, total_steps, origin)
    if config.resume == "auto":
        pattern = re.compile(r"\d{3}-" + re.escape(config.model.replace("/", "-")))
        runs = [path for path in Path(config.output).expanduser().glob("*") if pattern.fullmatch(path.name)]
        for folder in sorted(runs, reverse=True):
            settings = _read_config(folder)
            if settings is None or config.different_curve(settings) or _is_finished(folder, total_steps):
                continue
            other = _other_origin(run_checkpoints(folder), origin, config)
            if other is not None:
                print(f"Not going on with {folder}: {other}. A new run begins.")
                continue
            try:
                held = lock(folder)
            except PermissionError:
                print(f"Not going on with {folder}: it cannot be written. A new run begins.")
                continue
            if held:
                _clean(folder)
                return folder, run_checkpoints(folder)
    return start_anew(config), []


def _is_finished(folder, total_steps):
    """Whether a checkpoint of the last step is there and can be read: a damaged one is made again from the one before.

    Where none can be read there is nothing to go on from, and `_run` says so and starts anew."""
    last = [path for path in run_checkpoints(folder) if int(path.stem) >= total_steps]
    return newest_whole(last, lambda sentence: None) is not None


def start_anew(config, instead_of=None):
    """A new run folder, locked; a folder chosen before, of which nothing can be read, is let go as it is."""
    if instead_of is not None:
        unlock(instead_of)
    folder = new_run(config.output, config.model)
    lock(folder)
    return folder


def _other_origin(paths, origin, config):
    """Why the run of these checkpoints, newest first, did not learn from `origin`; None where nothing says so."""
    for path in paths:
        with contextlib.suppress(*UNREADABLE):
            before = read_metadata(path).get("origin")
            return difference(before, origin, config) if isinstance(before, dict) and origin else None
    return None


def _named_run(config, total_steps, origin):
    path = _given(config.resume)
    _refuse_fewer_steps(config, path, total_steps)
    other = _other_origin(run_checkpoints(path) if path.is_dir() else [path], origin, config)
    if other is not None:
        raise ValueError(
            f"--resume {config.resume}: {other}; put that back, or begin anew with its weights by --start-from"
        )
    if path.is_dir():
        folder, paths = path, run_checkpoints(path)
    elif path.is_file():
        folder, paths = path.parent.parent, [path]
        if not (folder / "config.json").exists() or run_checkpoints(folder)[:1] != [path]:
            # going on from an older checkpoint must not overwrite what came after it
            if newest_whole(paths, print) is None:
                raise ValueError(f"--resume {config.resume}: none of its checkpoints can be read")
            new = start_anew(config)
            if (folder / "metrics.jsonl").exists():
                (new / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
            return new, paths
    else:
        raise ValueError(f"--resume {config.resume}: there is no such checkpoint or run folder")
    if not paths:
        raise ValueError(f"--resume {config.resume}: the folder holds no checkpoint; start anew with --resume never")
    try:
        held = lock(folder)
    except PermissionError as error:
        raise ValueError(f"--resume {config.resume}: {error}; copy it elsewhere, and give the copy") from error
    if not held:
        raise ValueError(f"--resume {config.resume}: another process is training in that folder")
    _clean(folder)
    return folder, paths


def _given(path):
    """An empty text, a shell variable that is not set, would be the current folder."""
    if not str(path):
        raise ValueError("--resume is empty; give auto, never, a run folder or a checkpoint")
    return Path(path).expanduser()


def _refuse_fewer_steps(config, path, total_steps):
    """Before anything is written again: a run that has gone further than these settings go has nothing to do."""
    step = newest_step(path)
    if path.is_file():
        step = read_metadata(path).get("step")
    if isinstance(step, int) and step > total_steps:
        raise ValueError(
            f"--resume {config.resume}: it has reached step {step}, and the settings ask for {total_steps}; "
            "give a larger --steps or --epochs"
        )


def _clean(folder):
    """Remove what a killed process had begun to write, and nothing that anybody else put here."""
    for place in (Path(folder), Path(folder, "checkpoints"), Path(folder, "samples")):
        remove_leftovers(place)


def settings_of(path):
    """The training settings of a run folder or a checkpoint, as a dict. Raises ValueError if there are none."""
    path = _given(path)
    settings = _read_config(path) if path.is_dir() else None
    if path.is_file():
        try:
            settings = read_metadata(path).get("training")
        except UNREADABLE as error:
            raise ValueError(f"--resume {path}: the file cannot be read ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"--resume {path}: this is no run folder (with a config.json) and no training checkpoint")
    return settings


def write_config(folder, config):
    with atomic_write(Path(folder) / "config.json") as temporary:
        Path(temporary).write_text(json.dumps(config.as_dict(), indent=2) + "\n")


def _read_config(folder):
    try:
        settings = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return None
    return settings if isinstance(settings, dict) else None


def truncate_metrics(folder, step):
    """Drop the lines of steps after `step`: they will be written again."""
    path = Path(folder) / "metrics.jsonl"
    if path.exists():
        kept = [json.dumps(line) + "\n" for line in read_metrics(Path(folder)) if line["step"] <= step]
        with atomic_write(path) as temporary:
            Path(temporary).write_text("".join(kept))
