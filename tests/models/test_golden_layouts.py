"""Keys and shapes, in order: of the golden networks, and of those behind the released checkpoints."""

import json
from pathlib import Path

import pytest
import torch

import lfm_fast
from lfm_fast.models import from_reference_config, num_parameters

GOLDEN = Path(__file__).parents[1] / "golden"
NETWORKS = sorted(path.stem for path in GOLDEN.glob("*.safetensors"))
MANIFESTS = sorted(path.stem for path in GOLDEN.glob("*.json"))
# the released U-Nets by the name and arguments that make them
BY_NAME = {
    "church_adm": ("adm-original", {}),
    "celeb256_adm": ("adm-original-celeba256", {}),
    "celeb512_adm": ("adm-original-celeba512", {"image_size": 512}),
    "inpainting": ("adm-original", {"in_channels": 9, "out_channels": 4}),
    "semantic": ("adm-original", {"in_channels": 8, "out_channels": 4}),
    "ffhq_adm": ("adm", {}),
    "imnet_adm": ("adm", {"num_classes": 1000, "label_dropout": 0.1}),
}


def test_all_of_them_are_here():
    assert (len(NETWORKS), len(MANIFESTS)) == (10, 9)


def assert_layout(config, state_shapes, params):
    with torch.device("meta"):
        model = from_reference_config(config)
    found = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert list(found.items()) == list(state_shapes.items())  # the order too
    assert num_parameters(model) == params
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_of_a_golden_network(name, golden_networks):
    golden = golden_networks[name]
    assert_layout(golden.config, golden.state_shapes, golden.config["params"])
    buffers = dict(from_reference_config(golden.config).named_buffers())
    assert list(buffers) == golden.buffers
    for key, value in buffers.items():
        assert key.endswith("freqs") or torch.equal(value, golden.tensors[f"buffer.{key}"])


@pytest.mark.parametrize("name", MANIFESTS)
def test_of_a_released_network(name):
    manifest = json.loads((GOLDEN / f"{name}.json").read_text())
    config = {"family": manifest["family"], **manifest["config"]}
    released = assert_layout(config, manifest["state_shapes"], manifest["params"])
    if name in BY_NAME:
        network, arguments = BY_NAME[name]
        with torch.device("meta"):
            assert lfm_fast.create_model(network, **arguments).config == released.config
