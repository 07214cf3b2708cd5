"""--precision: what a training step multiplies in."""

import pytest
import torch
from tiny_run import SETTINGS, TinySource

from lfm_fast.distributed import World
from lfm_fast.models.fp8 import Fp8Linear
from lfm_fast.train import step
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
    train_step(state, source, config, training_path(config), WORLD)
    return state


def test_a_step_in_float8_has_the_gradient_of_one_in_bfloat16():
    """On a CPU, where PyTorch converts the numbers; after one step AdamW's first average is the gradient's tenth."""
    fp8, bf16 = (stepped(settings(precision=precision, batch_size=2)) for precision in ("fp8", "bf16"))
    assert sum(isinstance(module, Fp8Linear) for module in fp8.model.modules()) == 2 * 4
    assert all(p.dtype is torch.float32 and p.grad is None for p in fp8.model.parameters())
    gradients = [
        torch.cat([s.optimizer.state[p]["exp_avg"].flatten() for p in s.model.parameters() if p.requires_grad])
        for s in (fp8, bf16)
    ]
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.98
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
