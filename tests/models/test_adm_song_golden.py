"""ADM, DDPM++ and NCSN++ against what the reference implementation computed, and its checkpoints' format."""

import pytest
import torch
from golden_checks import FLOAT32, GUIDED, UNGUIDED, relative_error

import lfm_fast
from lfm_fast import ops
from lfm_fast.models import adm, edm_layers, song

NAMES = ["adm_uncond", "adm_labelled", "adm_heads", "ddpmpp", "ncsnpp"]


@torch.no_grad()
def evaluate(model, tensors, dtype, labelled=True):
    t, z = tensors["t"].to(dtype), tensors["z"].to(dtype)
    return model.to(dtype)(t, z, tensors.get("y") if labelled else None)


def velocity_by_one_step(model, tensors, scale):
    """The guided velocity as `lfm_fast.sample` forms it: an Euler step of 1/8 from the time of each sample."""
    velocities = []
    for t, z, y in zip(tensors["t"].double(), tensors["z"].double(), tensors["y"]):
        settings = {"guidance_scale": scale, "null_label": model.null_label, "method": "euler", "num_steps": 1}
        place = {"t_start": t.item(), "t_end": t.item() - 0.125}
        end = lfm_fast.sample(model, z[None], y=y[None], **settings, **place)
        velocities.append((z[None] - end) / 0.125)
    return torch.cat(velocities)


def errors(model, tensors):
    """Relative error of the float64 evaluation for each stored output that is no guided one."""
    labelled = {"v": True, "v_cond": True, "v_uncond": False}
    names = labelled.keys() & tensors.keys()
    return {k: relative_error(evaluate(model, tensors, torch.float64, labelled[k]), tensors[k]) for k in names}


@pytest.mark.parametrize("name", NAMES)
def test_float64_evaluation_matches_the_reference(name, golden_networks, build_golden):
    golden = golden_networks[name]
    found = errors(build_golden(golden), golden.tensors)
    assert set(found) == {key for key in golden.tensors if key in ("v", "v_cond", "v_uncond")}
    assert max(found.values()) <= UNGUIDED, found


@pytest.mark.parametrize("name", ["adm_labelled", "adm_heads"])
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guided_velocity_matches_the_reference(name, scale, golden_networks, build_golden):
    golden = golden_networks[name]
    model = build_golden(golden).double()
    found = velocity_by_one_step(model, golden.tensors, scale)
    assert relative_error(found, golden.tensors[f"v_guided_{scale}"]) <= GUIDED


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["reference", "cpp"])  # cpp where there is a compiled library
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_float32_evaluation_matches_the_float64_one(name, backend, layout, golden_networks, build_golden):
    golden = golden_networks[name]
    model = build_golden(golden)
    exact = evaluate(model, golden.tensors, torch.float64)
    model.to(memory_format=layout)
    with ops.use_backend(backend):
        found = evaluate(model, golden.tensors, torch.float32)
    assert relative_error(found, exact) <= FLOAT32


def swapped(make):
    """Cosines for sines."""
    return lambda *arguments: make(*arguments).roll(make(*arguments).shape[1] // 2, dims=1)


def of_the_first_sample(make):
    return lambda norm, x, scale, shift: make(norm, x, scale[:1].expand_as(scale), shift)


# (golden file, where, which name, how it is broken)
MISTAKES = {
    "ADM, epsilon of the norms": ("adm_labelled", adm, "_NORM_EPS", lambda _: 1e-6),
    "ADM, sine before cosine": ("adm_labelled", adm, "time_features", swapped),
    "ADM, heads of another width": ("adm_labelled", adm, "_HEAD_SIZE", lambda _: 32),
    "ADM, one modulation for all": ("adm_labelled", edm_layers.GroupNorm, "modulated", of_the_first_sample),
    "DDPM++, epsilon of the norms": ("ddpmpp", song, "_NORM_EPS", lambda _: 1e-5),
    "DDPM++, cosine before sine": ("ddpmpp", song.PositionalFeatures, "forward", swapped),
    "DDPM++, labels in units of one": ("ddpmpp", song.SongUNet, "one_hot", lambda f: lambda *a: f(*a) * 10**-0.5),
    "NCSN++, cosine before sine": ("ncsnpp", song.FourierFeatures, "forward", swapped),
    "NCSN++, input half as strong": ("ncsnpp", song.AuxiliaryInput, "forward", lambda f: lambda *a: f(*a) / 2),
    "NCSN++, sums as they are": ("ncsnpp", song, "_HALF", lambda _: 1.0),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_golden_outputs_tell_a_mistake(mistake, golden_networks, build_golden, monkeypatch):
    name, where, attribute, broken = MISTAKES[mistake]
    monkeypatch.setattr(where, attribute, broken(getattr(where, attribute)))
    golden = golden_networks[name]
    found = errors(build_golden(golden), golden.tensors)
    assert found.get("v_cond", found.get("v")) > UNGUIDED
