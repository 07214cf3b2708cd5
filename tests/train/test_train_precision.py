"""--precision: what a training step multiplies in."""

import re

import pytest
import torch
from tiny_run import SETTINGS, TinySource

from lfm_fast import ops
from lfm_fast.distributed import World
from lfm_fast.models.fp8 import Fp8Linear
from lfm_fast.train import report, resume, step
from lfm_fast.train.config import from_preset
from lfm_fast.train.loop import build_state, resolve_precision, training_path
from lfm_fast.train.step import train_step

WORLD, CPU = World(), torch.device("cpu")


def settings(**changes):
    return from_preset(**{**SETTINGS, "num_classes": 3, "label_dropout": 0.3, **changes})


def stepped(config):
    """The state after one step from weights without zeros, through which every gradient flows."""
    source = TinySource()
    state = build_state(config, source, WORLD)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in state.model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.2, generator=generator)
    state.renew_copies()
    train_step(state, source, config, training_path(config), WORLD)
    return state


def test_a_step_in_float8_has_the_gradient_of_one_in_bfloat16():
    """On a CPU, where PyTorch converts the numbers; after one step AdamW's first average is the gradient's tenth."""
    fp8, bf16 = (stepped(settings(precision=precision, batch_size=2)) for precision in ("fp8", "bf16"))
    assert sum(isinstance(module, Fp8Linear) for module in fp8.model.modules()) == 2 * 4
    assert all(p.dtype is torch.float32 and p.grad is None for p in fp8.model.parameters())
    assert torch.nn.functional.cosine_similarity(gradient_of(fp8), gradient_of(bf16), dim=0) > 0.98
    assert float(fp8.loss_sum) == pytest.approx(float(bf16.loss_sum), rel=0.02)
    assert float(fp8.loss_sum) != float(bf16.loss_sum)


def test_its_samples_are_drawn_in_bfloat16():
    """The average of the weights is a network of its own, made before the layers change."""
    state = stepped(settings(precision="fp8", batch_size=2))
    assert not any(isinstance(module, Fp8Linear) for module in state.ema.average.modules())
    assert state.ema.average.state_dict().keys() == state.model.state_dict().keys()


@pytest.mark.parametrize("precision", ["fp8", "tf32"])
def test_a_cpu_is_refused(precision):
    with pytest.raises(ValueError, match=f"precision {precision} exists on CUDA devices only, and this is a cpu; "):
        resolve_precision(precision, CPU)


def test_sizes_that_do_not_fit_float8_are_refused(monkeypatch):
    from lfm_fast.models import NETWORKS

    family, sizes = NETWORKS["DiT-Tiny"]
    monkeypatch.setitem(NETWORKS, "DiT-Tiny", (family, {**sizes, "hidden_size": 40}))
    with pytest.raises(ValueError, match="fp8 multiplies matrices whose sizes are multiples of 16, but a layer has 40"):
        build_state(settings(precision="fp8"), TinySource(), WORLD)


@pytest.mark.parametrize(("precision", "inside"), [("fp32", "highest"), ("tf32", "high"), ("bf16", "high")])
def test_tf32_is_on_for_a_step_and_off_after_it(precision, inside, monkeypatch):
    """On CUDA, for what is left in float32; forward and backward alike. No GPU is needed to see the setting."""
    products, seen = step._products, []
    monkeypatch.setattr(step, "_products", lambda config, device: products(config, torch.device("cuda")))
    config, source = settings(precision=precision), TinySource()
    state = build_state(config, source, WORLD)
    note = lambda *call: seen.append(torch.get_float32_matmul_precision())  # noqa: E731
    state.model.blocks[0].register_forward_hook(note)
    state.model.final_layer.linear.weight.register_hook(note)
    train_step(state, source, config, training_path(config), WORLD)
    assert seen == [inside] * 2
    assert torch.get_float32_matmul_precision() == "highest"


def gradient_of(state):
    """Of one step: AdamW's first average."""
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    return torch.cat([state.optimizer.state[p]["exp_avg"].flatten() for p in parameters])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_pure_bfloat16_rounds_float32_weights(backend):
    """The network holds the optimizer's weights rounded, also after steps too small for bfloat16 to see."""
    with ops.use_backend(backend):
        state, plain = (stepped(settings(precision=p, learning_rate=1e-6)) for p in ("bf16-pure", "fp32"))
    assert all(p.dtype is torch.bfloat16 and p.grad is None for p in state.network.parameters())
    assert all(p.dtype is torch.float32 and p.grad is None for p in state.model.parameters())
    for (name, master), low in zip(state.model.named_parameters(), state.network.parameters(), strict=True):
        assert torch.equal(low, master.bfloat16()), name
        assert state.ema.average.get_parameter(name).dtype is torch.float32
    moved = [torch.equal(p, p.bfloat16().float()) for p in state.model.parameters() if p.requires_grad]
    assert not any(moved)
    assert torch.nn.functional.cosine_similarity(gradient_of(state), gradient_of(plain), dim=0) > 0.99
    assert state.grad_norm.dtype is torch.float32
    assert float(state.grad_norm) == pytest.approx(float(plain.grad_norm), rel=0.05)


def test_pure_bfloat16_clips_in_parts_and_goes_on_from_its_checkpoint(tmp_path):
    """Stopped after a step and resumed, it ends with the bits of a run that was not."""
    config = settings(precision="bf16-pure", clip_grad_norm=0.1, accumulation_steps=2)
    source, path = TinySource(), training_path(config)
    whole, first, second = (build_state(config, source, WORLD) for _ in range(3))
    for state, steps in ((whole, 3), (first, 1)):
        for _ in range(steps):
            train_step(state, source, config, path, WORLD)
    (tmp_path / "checkpoints").mkdir()
    with torch.no_grad():
        for copy in second.copies.values():
            copy.zero_()
    resume.restore(resume.save_checkpoint(tmp_path, first, config), second, WORLD)
    for _ in range(2):
        train_step(second, source, config, path, WORLD)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True))


@pytest.mark.parametrize(("precision", "bytes_each"), [("fp32", 4), ("bf16-pure", 6)])
def test_a_dry_run_counts_the_copy(precision, bytes_each):
    said = report.describe(settings(precision=precision, model="DiT-S/2"), WORLD, (4, 8, 8))
    parameters = int(re.search(r"([\d,]+) parameters", said).group(1).replace(",", ""))
    assert parameters > 30e6
    assert f"weights {bytes_each * parameters / 1e9:.2f}" in said
