"""Reading and writing weights: ours in safetensors, and LFM's `.pth` files.

Ours are one safetensors file whose metadata values are JSON; `config` is the network's configuration. A file of weights
has the network's own keys; a training checkpoint has `model.*`, `ema.*` and `optimizer.*` side by side.
"""

import argparse
import contextlib
import json
import os
import pickle
import re
import secrets
import shutil
import socket
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm_fast.models import from_config
from lfm_fast.models.edm_layers import FILTER, Filtered
from lfm_fast.models.recognise import recognise
from lfm_fast.models.shapes import differences, shapes_of

_TRAINING_PREFIXES = ("model.", "ema.", "optimizer.")
_PARTIAL = ".partial"
_CONVERT = "their time or prediction is not ours: convert it, as `lfm-fast convert --from sit` does"
_UMASK = os.umask(0)
os.umask(_UMASK)  # it can only be read by setting it


def load_checkpoint(path: str | os.PathLike, model: nn.Module | None = None, *, weights: str = "ema") -> nn.Module:
    """Load weights from a file and return the network in evaluation mode.

    Reads our safetensors files (weights, or training checkpoints, from which `weights` takes "ema" where there is one,
    or "model") and LFM's: a plain state dict or `model_N.pth`, prefixed with `module.` or not, and `content.pth`.
    Pickles are read with nothing allowed but tensors, plain containers and argparse.Namespace.

    With `model` the weights are copied into it and keep its dtype and device. Without, the network is built on the CPU
    in float32, from the file's own configuration or, where it has none, as the known network of exactly these shapes.
    Raises ValueError for a missing or damaged file (a training checkpoint's checksum is compared), for one that holds
    anything else, and for weights that do not fit; `model` is then as it was.

        model = lfm_fast.load_checkpoint("model_475.pth")
    """
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; give a torch.nn.Module, or none to have it built.")
    state_dict, config, hints = read_state_dict(path, weights)
    with _naming(Path(path)):
        if model is not None:
            _require_fit(model, state_dict)
            model.load_state_dict(state_dict)
            return model.eval()
        if hints.get("project"):
            raise ValueError(f"this is a training checkpoint {hints['project']}; {_CONVERT}.")
        if config is None:
            model = recognise(shapes_of(state_dict), hints)
        else:
            with torch.device("meta"):
                model = from_config(config)
        _require_fit(model, state_dict)
    model.load_state_dict({name: _own_float32(tensor) for name, tensor in state_dict.items()}, assign=True)
    return model.eval()


def save_weights(path: str | os.PathLike, state_dict: dict[str, Tensor], metadata: dict | None = None) -> None:
    """Write tensors and JSON-able metadata to one safetensors file, atomically.

    Raises ValueError for a value that is no tensor or no JSON, OSError when the file cannot be written.
    """
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"a weights file holds tensors only, but {name!r} is a {type(value).__name__}.")
    try:
        texts = {str(name): json.dumps(value) for name, value in (metadata or {}).items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"the metadata of {path} is not JSON: {error}.") from error
    tensors = {name: value.detach().to("cpu").contiguous() for name, value in state_dict.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, texts)


def read_weights(path: str | os.PathLike, prefix: str = "", *, verify: bool = False) -> tuple[dict[str, Tensor], dict]:
    """Read a safetensors file: (tensors whose names begin with `prefix`, which is cut off; metadata).

    `verify` reads all of a training checkpoint and compares its `checksum`. Metadata values that are not JSON stay
    strings. Raises ValueError for a missing or damaged file.
    """
    path = Path(path)
    _require_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            metadata = {name: _from_json(text) for name, text in (file.metadata() or {}).items()}
            if verify and "checksum" in metadata and _is_training(names):
                found = _crc((name, file.get_tensor(name)) for name in sorted(names))
                if found != metadata["checksum"]:
                    raise ValueError(f"{path} is damaged: its checksum does not match its contents.")
            tensors = {name[len(prefix) :]: file.get_tensor(name).clone() for name in names if name.startswith(prefix)}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}).") from error
    return tensors, metadata


def read_metadata(path: str | os.PathLike) -> dict:
    """The metadata of a safetensors file, without its tensors. Raises ValueError for a missing or damaged file."""
    return read_weights(path, prefix="no tensor: the metadata alone")[1]


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC-32 of names and bytes in the order of the names: safetensors itself notices a wrong length only."""
    return _crc((name, tensors[name]) for name in sorted(tensors))


def run_checkpoints(folder: str | os.PathLike) -> list[Path]:
    """The numbered checkpoints of a training run's folder, newest first (by number)."""
    found = [path for path in Path(folder, "checkpoints").glob("*.safetensors") if re.fullmatch("[0-9]+", path.stem)]
    return sorted(found, key=lambda path: int(path.stem), reverse=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to, and put it in place when the block ends without an error.

    A kill at any instant leaves either the old file or the new one, whole and on the disk. The folder is made when it
    is missing; partial files that killed processes of this machine left in it are removed. Raises OSError with one
    sentence that names `path` where it cannot be written, safetensors' own error included.

        with atomic_write(folder / "stats.json") as temporary:
            temporary.write_text(text)
    """
    path = Path(path)
    temporary = _partial_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        yield temporary
        os.chmod(temporary, 0o666 & ~_UMASK)  # safetensors makes files that nobody else can read
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        with contextlib.suppress(OSError):  # its folder may never have been
            temporary.unlink()


@contextlib.contextmanager
def replace_files(folder: str | os.PathLike, last: str) -> Iterator[Path]:
    """Give a temporary folder to write to, and put its files in place in `folder` when the block ends without an error.

    Until all of them are written and on the disk, nothing in `folder` changes. Then the file `last`, without which
    nobody takes the folder for a whole one, is removed, the others are renamed into place, and `last` comes last: a
    kill leaves the old files, the new ones, or a folder without `last`. Other files in `folder` stay.

        with replace_files(folder, last="model_index.json") as temporary:
            save_weights(temporary / "weights.safetensors", weights)
            (temporary / "model_index.json").write_text(text)
    """
    folder = Path(folder)
    temporary = _partial_of(folder / last)
    try:
        temporary.mkdir(parents=True)
        remove_leftovers(folder)
        yield temporary
        files = sorted((path for path in temporary.rglob("*") if path.is_file()), key=lambda path: path.name == last)
        for path in files:
            _sync(path)
        (folder / last).unlink(missing_ok=True)
        for path in files:
            place = folder / path.relative_to(temporary)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
            _sync(place.parent)
    except OSError as error:
        raise OSError(str(error).replace(str(temporary), str(folder))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _partial_of(path: Path) -> Path:
    """A name beside `path` for what is being written, by which `remove_leftovers` knows whose it is."""
    return path.parent / f".{path.name}.{socket.gethostname()}~{os.getpid()}~{secrets.token_hex(4)}{_PARTIAL}"


def check_output(folder: str | os.PathLike, name: str = "--output") -> None:
    """Raise ValueError now, before hours of work, if nothing could be written to `folder` at their end."""
    folder = Path(folder).expanduser()
    standing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise ValueError(f"{name} {folder} cannot be written; choose another place")


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk: a rename may otherwise survive a crash that its data does not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what `atomic_write` and `replace_files` left in `folder` in processes of this machine that are gone."""
    for leftover in folder.glob(f".*~*~*{_PARTIAL}"):
        owner, pid, _ = leftover.name.rsplit("~", 2)
        if owner.endswith(f".{socket.gethostname()}") and pid.isdecimal() and not _is_running(int(pid)):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def read_state_dict(path: str | os.PathLike, weights: str = "ema") -> tuple[dict[str, Tensor], dict | None, dict]:
    """(state dict, configuration or None, hints about it) of any file that `load_checkpoint` reads, and of the training
    checkpoints of DiT, SiT and those after them: dicts with entries "model" and "ema".

    Hints are the arguments that a pickle keeps beside the weights and, as "project", whose file it seems to be.
    """
    if weights not in ("ema", "model"):
        raise ValueError(f'weights must be "ema" or "model", but is {weights!r}.')
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"path is a {type(path).__name__}; give the checkpoint file's path.")
    path = Path(path)
    _require_file(path)
    with open(path, "rb") as file:
        head = file.read(9)
    if head[8:] == b"{":  # safetensors: the header's length in eight bytes, then the header
        state_dict, metadata = _read_safetensors(path, weights)
        config = metadata.get("config")
        return state_dict, config if isinstance(config, dict) else None, {}
    _refuse_text(path)
    content = _read_pickle(path, zipped=head.startswith(b"PK\x03\x04"))
    hints = {}
    if isinstance(content, dict):
        arguments = content.get("args")
        hints = dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}
        entries = [name for name in (weights, "ema", "model") if isinstance(content.get(name), dict)]
        if "model_dict" in content:
            content = content["model_dict"]
        elif entries:
            hints["project"] = f"with entries {', '.join(map(repr, content))}, as DiT and SiT write them"
            content = content[entries[0]]
    return _plain_state_dict(path, content), None, hints


def _refuse_text(path: Path) -> None:
    """A page that says "not found", or Git's pointer to the file, saved under the checkpoint's name."""
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.decode("latin-1")
    if len(head) >= 16 and head.isascii() and all(letter.isprintable() or letter.isspace() for letter in text):
        raise ValueError(f"{path} is a text file that begins with {text[:40]!r}, no checkpoint; download it again.")


def _read_safetensors(path: Path, weights: str) -> tuple[dict[str, Tensor], dict]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}).") from error
    prefix = ""
    if _is_training(names):
        has_ema = any(name.startswith("ema.") for name in names)
        prefix = "ema." if weights == "ema" and has_ema else "model."
    state_dict, metadata = read_weights(path, prefix, verify=True)
    return _plain_state_dict(path, state_dict), metadata


def _is_training(names: list[str]) -> bool:
    return bool(names) and all(name.startswith(_TRAINING_PREFIXES) for name in names)


def _crc(named: Iterable[tuple[str, Tensor]]) -> int:
    crc = 0
    for name, tensor in named:
        data = tensor.contiguous().flatten().view(torch.uint8).numpy()
        crc = zlib.crc32(data, zlib.crc32(name.encode(), crc))
    return crc


def _read_pickle(path: Path, *, zipped: bool):
    """torch.load with weights_only, one more class allowed, and one sentence for whatever is wrong."""
    if zipped and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is truncated: the end of the archive is missing; copy or download it again.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # Mapped, a resumable checkpoint's optimizer state (two thirds of the file) is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise ValueError(
                f"{path} was refused: it holds a {refused[1]}, and nothing but tensors, plain containers and "
                "argparse.Namespace is read from a pickle; save its state dict alone."
            ) from error
        raise ValueError(f"{path} is truncated or no checkpoint.") from error
    except Exception as error:  # the unpickler meets damaged bytes with errors of any kind
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f"{path} is truncated or no checkpoint ({reason}).") from error


def _plain_state_dict(path: Path, content) -> dict[str, Tensor]:
    """Check that this is names and tensors; cut `module.` off when every name has it (trained on several devices)."""
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict.")
    others = [name for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others or not content:
        found = f"{others[0]!r} is no tensor" if others else "it is empty"
        raise ValueError(f"{path} holds no plain state dict: {found}.")
    prefix = "module." if all(name.startswith("module.") for name in content) else ""
    return {name[len(prefix) :]: tensor.detach() for name, tensor in content.items()}


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the checkpoint file in it.")
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; copy or download it again.")


def _require_fit(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Everything that could stop the copying half-way, or spoil it without a word, is refused here."""
    expected = model.state_dict()
    difference = differences(shapes_of(expected), shapes_of(state_dict))
    if difference:
        raise ValueError(f"these weights do not fit the network ({type(model).__name__}); {difference}.")
    filters = {f"{name}.{FILTER}": module for name, module in model.named_modules() if isinstance(module, Filtered)}
    for name, tensor in state_dict.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else str(tensor.layout)
            raise ValueError(f"{name} is a {kind} tensor; save plain dense ones.")
        if _kind(tensor) != _kind(expected[name]):
            raise ValueError(f"{name} is {tensor.dtype}, but the network has {expected[name].dtype} there.")
        if name in filters and (another := filters[name].not_its_filter(tensor)):
            raise ValueError(f"{name} {another}.")


def _kind(tensor: Tensor) -> str:
    return "complex" if tensor.is_complex() else "floating" if tensor.is_floating_point() else "integer"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Begin the sentence of an error with the file it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _own_float32(tensor: Tensor) -> Tensor:
    """A copy, since what was read may still be a view of the file: rewriting that would change the network."""
    return tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _from_json(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text
