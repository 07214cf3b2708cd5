"""DiT against what the reference implementation computed, and against the format of its checkpoints."""

from types import SimpleNamespace

import pytest
import torch
from golden_checks import FLOAT32, GUIDED, UNGUIDED, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel

from lfm_fast import ops
from lfm_fast.models import dit, layers

NAMES = ["dit_uncond", "dit_labelled"]


@torch.no_grad()
def evaluate(model, tensors, dtype):
    model = model.to(dtype)
    t, z = tensors["t"].to(dtype), tensors["z"].to(dtype)
    return model(t, z, tensors["y"]), model(t, z)


def errors(model, golden):
    """Relative errors of the float64 evaluation, by the name of the stored output."""
    tensors = golden.tensors
    v_cond, v_uncond = evaluate(model, tensors, torch.float64)
    found = {"v_cond": v_cond, "v_uncond": v_uncond}
    for name in tensors:
        if name.startswith("v_guided_"):
            scale = float(name.removeprefix("v_guided_"))
            found[name] = scale * v_cond + (1 - scale) * v_uncond
    return {name: relative_error(value, tensors[name]) for name, value in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_float64_evaluation_matches_the_reference(name, golden_networks, build_golden):
    golden = golden_networks[name]
    found = errors(build_golden(golden), golden)
    assert sum(key.startswith("v_guided") for key in found) == (2 if name == "dit_labelled" else 0)
    for key, error in found.items():
        assert error <= (GUIDED if key.startswith("v_guided") else UNGUIDED), (key, error)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpp"])  # cpp where there is a compiled library
def test_float32_evaluation_matches_the_float64_one(name, attention, backend, golden_networks, build_golden):
    golden = golden_networks[name]
    model = build_golden(golden)
    exact = evaluate(model, golden.tensors, torch.float64)
    with sdpa_kernel(attention), ops.use_backend(backend):
        found = evaluate(model, golden.tensors, torch.float32)
    assert max(map(relative_error, found, exact)) <= FLOAT32


def first_samples(op):
    """`op` with the modulation of sample 0 for the whole batch."""
    return lambda *tensors: op(*(x[:1].expand_as(x) if getattr(x, "ndim", 0) == 2 else x for x in tensors))


WITH_THE_FIRST_SAMPLES_MODULATION = SimpleNamespace(
    **{name: first_samples(getattr(ops, name)) for name in ("modulated_layer_norm", "gated_residual_norm")}
)

# mistake -> (where, which name, how it is broken)
MISTAKES = {
    "epsilon of the norms": (dit, "_NORM_EPS", lambda _: 1e-5),
    "sine before cosine": (layers, "time_features", lambda make: lambda t, w, d: make(t, w, d).roll(w // 2, dims=-1)),
    "row before column": (dit, "sincos_table", lambda make: lambda side, d: make(side, d).roll(d // 2, dims=-1)),
    "one modulation for all": (dit, "ops", lambda _: WITH_THE_FIRST_SAMPLES_MODULATION),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_golden_outputs_tell_a_mistake(mistake, golden_networks, build_golden, monkeypatch):
    module, name, broken = MISTAKES[mistake]
    monkeypatch.setattr(module, name, broken(getattr(module, name)))
    golden = golden_networks["dit_labelled"]
    assert errors(build_golden(golden), golden)["v_cond"] > UNGUIDED
