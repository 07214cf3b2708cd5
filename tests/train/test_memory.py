"""What a training step holds: the count on tensors without storage against PyTorch's own accounting of real ones."""

import json
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from lfm_fast import _library, ops
from lfm_fast.distributed import World
from lfm_fast.models import DiT, create_model
from lfm_fast.models.checkpointing import MODES
from lfm_fast.train import memory, report
from lfm_fast.train.config import from_preset

S2 = (4, 32, 32)  # latents of 256 pixels: DiT-S/2 has 256 tokens


def allocations(call, folder):
    """Every change of PyTorch's allocator during `call`, in bytes, in order, and None where a marker was set."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    file = folder / "trace.json"
    profiler.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    events = [e for e in events if e.get("name") in ("[memory]", "between the passes") and e["ph"] in "iX"]
    return [e["args"]["Bytes"] if e["name"] == "[memory]" else None for e in sorted(events, key=lambda e: e["ts"])]


def measured(model, samples, latent_shape, precision, folder):
    """(kept between the passes, peak) of a real step; the gradients are there before, so that they do not count."""

    def step():
        t, z, target = torch.rand(samples), torch.randn(samples, *latent_shape), torch.randn(samples, *latent_shape)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            velocity = model(t, z)
        with torch.profiler.record_function("between the passes"):
            pass
        ops.velocity_loss(velocity, target).sum().backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    held = peak = kept = 0
    for change in allocations(step, folder):
        held += change or 0
        peak, kept = max(peak, held), held if change is None else kept
    return kept, peak


def per_image(count):
    return [more - fewer for fewer, more in zip(count(1), count(2), strict=True)]


@pytest.mark.parametrize(("precision", "mode"), [("fp32", "none"), ("bf16", "selective")])
def test_the_dry_runs_memory_per_image_is_what_a_step_of_s2_holds(precision, mode, tmp_path):
    config = from_preset("imagenet256-dit-b2", model="DiT-S/2", batch_size=4, precision=precision)
    config.activation_checkpointing = mode
    said = report.describe(config, World(), S2)
    peak, kept = re.search(r"activations: ([\d.]+) MB per image at the peak, of which ([\d.]+) wait", said).groups()
    model = create_model("DiT-S/2")
    model.activation_checkpointing = mode
    real_kept, real_peak = per_image(lambda n: measured(model, n, S2, precision, tmp_path))
    assert float(peak) == pytest.approx(real_peak / 1e6, rel=0.15)
    assert float(kept) == pytest.approx(real_kept / 1e6, rel=0.15)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_whole_count_is_the_allocators(mode, precision, tmp_path):
    def network():
        model = DiT(image_size=16, hidden_size=96, depth=3, num_heads=3)
        model.activation_checkpointing = mode
        return model

    kept, peak = measured(network(), 3, (4, 16, 16), precision, tmp_path)
    with FakeTensorMode():
        counted = memory.of_step(network(), 3, (4, 16, 16), precision)
    # What kernels allocate inside themselves no operator returns. On matrix tiles, mlp's backward: both weights packed
    # and the gradient between the layers, of 3 x 64 tokens; all in bfloat16.
    on_tiles = precision == "bf16" and _library.why_no_tiles() is None
    inside = 2 * (2 * 96 * 384 + 3 * 64 * 384) if on_tiles else 0
    assert (counted.kept, counted.peak) == pytest.approx((kept, peak - inside), rel=0.05)


def test_gradients_are_counted_once_and_apart():
    torch.manual_seed(0)
    model = DiT(image_size=8, hidden_size=32, depth=1, num_heads=2)
    counted = memory.of_step(model, 1, (4, 8, 8), "fp32")
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    # at the end all gradients are there, and with one small sample little else
    assert trained <= counted.peak_with_gradients <= trained + counted.peak
    assert counted.kept <= counted.peak
    assert all(p.grad is None for p in model.parameters())


def test_xl2_with_selective_checkpointing_keeps_at_most_200_mb_per_image():
    def count(samples):
        with FakeTensorMode():
            model = create_model("DiT-XL/2", num_classes=1000, label_dropout=0.1)
            model.activation_checkpointing = "selective"
            counted = memory.of_step(model, samples, S2, "bf16")
        return counted.kept, counted.peak

    kept, peak = per_image(count)
    # 28 blocks of 256 x 1152: ten tensors of products in bfloat16 each, and x in float32 for every second one
    assert kept == pytest.approx(256 * 1152 * (28 * 10 * 2 + 14 * 4), rel=0.01)
    assert kept <= 200e6
    assert peak <= 1.15 * 200e6
