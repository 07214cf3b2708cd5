"""The U-Nets of guided diffusion against what the reference computed, and against the format of its checkpoints."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from golden_checks import FLOAT32, UNGUIDED, relative_error
from torch.nn.attention import SDPBackend, sdpa_kernel

from lfm_fast import ops
from lfm_fast.models import guided_layers, spatial_transformer, unet

NAMES = ["unet_uncond", "unet_variants", "unet_layout"]


@torch.no_grad()
def evaluate(model, tensors, dtype):
    context = {"context": tensors["context"].to(dtype)} if "context" in tensors else {}
    return model.to(dtype)(tensors["t"].to(dtype), tensors["z"].to(dtype), tensors.get("y"), **context)


def error_of(model, golden):
    (expected,) = (value for name, value in golden.tensors.items() if name in ("v", "v_cond"))
    return relative_error(evaluate(model, golden.tensors, torch.float64), expected)


@pytest.mark.parametrize("name", NAMES)
def test_float64_evaluation_matches_the_reference(name, golden_networks, build_golden):
    golden = golden_networks[name]
    assert error_of(build_golden(golden), golden) <= UNGUIDED


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpp"])  # cpp where there is a compiled library
def test_float32_evaluation_matches_the_float64_one(name, attention, backend, golden_networks, build_golden):
    golden = golden_networks[name]
    model = build_golden(golden)
    exact = evaluate(model, golden.tensors, torch.float64)
    with sdpa_kernel(attention), ops.use_backend(backend):
        assert relative_error(evaluate(model, golden.tensors, torch.float32), exact) <= FLOAT32


def with_gelu(approximate):
    return SimpleNamespace(**{**vars(F), "gelu": functools.partial(F.gelu, approximate=approximate)})


def wrong(method):
    """A decorator of methods: `method(original, self, *arguments)` in the place of original(self, *arguments)."""
    return lambda original: lambda self, *arguments, **options: method(original, self, *arguments, **options)


# mistake -> (network that shows it, where, which name, how it is broken)
MISTAKES = {
    "epsilon of the norms": (
        *("unet_uncond", guided_layers.GroupNorm, "__init__"),
        wrong(lambda original, self, channels, eps=1e-6: original(self, channels, eps)),
    ),
    "epsilon of the transformer's norm": (
        *("unet_layout", guided_layers.GroupNorm, "__init__"),
        wrong(lambda original, self, channels, eps=1e-5: original(self, channels, 1e-5)),
    ),
    "sine before cosine": (
        *("unet_uncond", unet, "time_features"),
        lambda make: lambda t, width, dtype: make(t, width, dtype).roll(width // 2, dims=-1),
    ),
    "shift before scale": (
        *("unet_uncond", guided_layers.GroupNorm, "modulated"),
        wrong(lambda original, self, x, scale, shift: original(self, x, shift, scale)),
    ),
    "one modulation for all": (
        *("unet_uncond", guided_layers.GroupNorm, "modulated"),
        wrong(lambda original, self, x, scale, shift: original(self, x, *(m[:1].expand_as(m) for m in (scale, shift)))),
    ),
    "order of q, k and v": (
        *("unet_variants", guided_layers.AttentionBlock, "__init__"),
        wrong(lambda original, self, channels, heads, thirds_first: original(self, channels, heads, not thirds_first)),
    ),
    "heads of the other way of counting them": ("unet_variants", unet, "heads", lambda _: lambda *arguments: 4),
    "tanh in the GELU": ("unet_layout", spatial_transformer, "F", lambda _: with_gelu("tanh")),
    "one context for all": (
        *("unet_layout", spatial_transformer.SpatialTransformer, "forward"),
        wrong(lambda original, self, x, context: original(self, x, context[:1].expand_as(context))),
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_golden_outputs_tell_a_mistake(mistake, golden_networks, build_golden, monkeypatch):
    name, where, what, broken = MISTAKES[mistake]
    monkeypatch.setattr(where, what, broken(getattr(where, what)))
    golden = golden_networks[name]
    assert error_of(build_golden(golden), golden) > UNGUIDED
