"""The network's part of the folder a flow is saved in, diffusers' layout.

A network of ours stands in `transformer/` (a DiT) or `unet/` (the others) as config.json, which names its class, and
weights. What predicts no velocity is saved as the network and, in the index, the adapter's arguments ("adapter").
A DiT may stand there as diffusers' DiTTransformer2DModel too; the index then holds its configuration here ("config").
"""

import json
from pathlib import Path

import torch
from torch import nn

from lfm_fast.autoencoder import WEIGHTS_FILE
from lfm_fast.checkpoint import atomic_write, load_checkpoint, save_weights
from lfm_fast.interop.adapter import Adapter
from lfm_fast.interop.dit import DiTVelocity
from lfm_fast.models import DiT, from_config

_COMPONENTS = ("transformer", "unet")


def component(network) -> list[str]:
    """[package, class], as an index names a component."""
    return [type(network).__module__.split(".")[0], type(network).__name__]


def prepare_network(model: nn.Module, as_diffusers: bool = False) -> tuple[str, nn.Module, dict]:
    """(folder's name, network to write there, what the index says of it) of a flow's network.

    Raises ValueError for what cannot be written so.
    """
    network, entries = model, {}
    if isinstance(model, Adapter):
        network, entries = model.network, {"adapter": _described(model)}
    name = "transformer" if isinstance(getattr(network, "network", network), DiT) else "unet"
    if as_diffusers:
        from lfm_fast.interop.diffusers import to_diffusers

        if entries:
            raise ValueError("diffusers' networks are saved without what makes a velocity of another prediction")
        entries, network = {"config": network.config}, to_diffusers(network)
    return name, network, {name: component(network), **entries}


def write_network(folder: Path, network: nn.Module, dtype: torch.dtype) -> None:
    """config.json and weights of a network, ours or diffusers' own, its floating-point weights as `dtype`."""
    if component(network)[0] == "diffusers":
        network.to(dtype).save_pretrained(folder)
        return
    weights = {key: x.to(dtype) if x.is_floating_point() else x for key, x in network.state_dict().items()}
    save_weights(folder / WEIGHTS_FILE, weights)
    write_json(folder / "config.json", {"_class_name": type(network).__name__, **network.config})


def read_network(folder: Path, index: dict) -> nn.Module:
    """The network of a flow's folder with this index, in its adapter where it had one."""
    name = next((name for name in _COMPONENTS if name in index), _COMPONENTS[0])
    if "config" in index:
        model = _from_diffusers(folder / name, index["config"])
    else:
        config = read_json(folder / name / "config.json", "family")
        model = from_config({key: value for key, value in config.items() if not key.startswith("_")})
        model = load_checkpoint(folder / name / WEIGHTS_FILE, model)
    return DiTVelocity(model, **index["adapter"]) if "adapter" in index else model


def read_json(path: Path, *needed: str) -> dict:
    """The object in a JSON file. Raises ValueError, naming the file, for anything else and where a name is missing."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; the folder is incomplete")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    missing = [name for name in needed if not isinstance(content, dict) or name not in content]
    if missing or not isinstance(content, dict):
        raise ValueError(f"{path} holds no {', '.join(missing) or 'object'}; save the flow again")
    return content


def write_json(path: Path, content) -> None:
    """Write JSON atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _described(adapter: Adapter) -> dict:
    if type(adapter) is not DiTVelocity or not isinstance(adapter.network, DiT):
        raise ValueError(
            f"a {type(adapter).__name__} of a {type(adapter.network).__name__} cannot be saved; only networks of ours "
            "can, alone or in a DiTVelocity, and lfm_fast.interop.files makes them of others"
        )
    return adapter.described()


def _from_diffusers(folder: Path, config: dict) -> DiT:
    from diffusers import DiTTransformer2DModel

    from lfm_fast.interop.diffusers import align, from_diffusers

    try:
        transformer = DiTTransformer2DModel.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, torch_dtype=torch.float32
        )
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder} does not load in diffusers: {str(error).splitlines()[0]}") from error
    labels = {name: config[name] for name in ("num_classes", "label_dropout")}
    return from_diffusers(align(transformer), **labels)
