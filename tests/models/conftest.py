"""The golden networks: weights by the formula of the golden data, outputs as the reference computed them."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lfm_fast.models import from_reference_config

GOLDEN = Path(__file__).parents[1] / "golden"


def formula_weight(name, shape, k):
    """Parameter number k: u = frac(sin((i + 1) 12.9898 + (k + 1) 78.233) 43758.5453), scaled to unit variance."""
    i = np.arange(int(np.prod(shape)), dtype=np.float64)
    a = np.sin((i + 1) * 12.9898 + (k + 1) * 78.233) * 43758.5453
    f = (((a - np.floor(a)) - 0.5) * np.sqrt(12.0)).reshape(shape)
    if len(shape) >= 2:
        value = f / np.sqrt(np.prod(shape[1:]))
    else:
        value = 1 + 0.1 * f if name.endswith("weight") else 0.1 * f
    return torch.from_numpy(value).float()


def read_golden(name):
    """config, state_shapes, seed and tensors of one golden network."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = {key: json.loads(value) for key, value in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    return SimpleNamespace(**metadata, tensors=tensors)


def golden_model(golden):
    """The network of a golden file with the formula's weights, float32, in evaluation mode."""
    model = from_reference_config(golden.config)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for j, name in enumerate(sorted(set(parameters) - {"pos_embed"})):
            parameters[name].copy_(formula_weight(name, tuple(parameters[name].shape), golden.seed * 1000 + j))
        for name, buffer in model.named_buffers():
            if name.endswith("freqs"):  # drawn when a network is made; others follow from its arguments
                buffer.copy_(golden.tensors[f"buffer.{name}"])
    return model.eval()


@pytest.fixture(scope="session")
def golden_networks():
    return {path.stem: read_golden(path.stem) for path in sorted(GOLDEN.glob("*.safetensors"))}


@pytest.fixture
def build_golden():
    return golden_model
