"""TF32: a setting of the whole process, changed while products run and put back."""

import importlib
import pickle

import pytest
import torch

import lfm_fast
from lfm_fast.models import precision


def setting():
    """What each of PyTorch's three ways to say it says."""
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


@pytest.fixture(autouse=True)
def as_before():
    before = setting()
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before[1:]


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
@pytest.mark.parametrize("tf32", [True, False])
def test_the_setting_is_put_back_after_an_error_too(before, tf32):
    torch.set_float32_matmul_precision(before)
    found = setting()
    within = []

    def fail():
        within.extend((torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32))
        raise KeyError

    with pytest.raises(KeyError), precision.float32_products(tf32):
        fail()
    assert within == ["high" if tf32 else "highest", tf32]
    assert setting() == found


def test_a_setting_of_one_library_alone_is_put_back():
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # PyTorch now refuses to say what holds for all
    with precision.float32_products(False):
        assert torch.backends.cuda.matmul.allow_tf32 is False
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_every_way_into_an_optimised_network_runs_in_tf32(monkeypatch):
    """A call, and the sampling form, which calls parts of it."""
    monkeypatch.setattr(importlib.import_module("lfm_fast.models.optimize"), "why_not", lambda *arguments: None)
    model = lfm_fast.create_model("DiT-Emoji/4", image_size=64)
    fast, seen = lfm_fast.optimize(model, "tf32"), []
    for part in (fast.t_embedder, fast.x_embedder, fast.blocks[0].attn, fast.final_layer):
        part.register_forward_hook(lambda *call: seen.append(torch.get_float32_matmul_precision()))
    t, z = torch.tensor([0.3, 0.7]), torch.randn(2, 4, 8, 8)
    assert torch.equal(fast(t, z), model(t, z).detach())
    assert seen == ["high"] * 4
    assert fast.prepares
    seen.clear()
    fast.prepare(t)(1, z)
    assert seen == ["high"] * 4
    assert torch.get_float32_matmul_precision() == "highest"
    assert model.products is not fast.products
    pickle.loads(pickle.dumps(fast.products))


def test_away_from_cuda_tf32_is_refused():
    with pytest.raises(ValueError, match="tf32 exists on CUDA devices only, and this is a cpu; use fp32"):
        lfm_fast.optimize(lfm_fast.create_model("DiT-Emoji/4", image_size=64), "tf32")
    assert precision.why_not("tf32", torch.device("cuda")) is None
    assert precision.why_not("bf16", torch.device("cpu")) is None
