"""float8: the arithmetic, by PyTorch's scaled product as it runs on a CPU, and that a CPU is refused all the same."""

import copy
import importlib
import itertools

import pytest
import torch

import lfm_fast
from lfm_fast.models import fp8, precision
from lfm_fast.models.layers import Linear

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
CPU = torch.device("cpu")


def representable(dtype):
    """Every finite number of a float8, in order; built from the bits."""
    exponent_bits, mantissa_bits, bias = {E4M3: (4, 3, 7), E5M2: (5, 2, 15)}[dtype]
    found = []
    for exponent, mantissa in itertools.product(range(2**exponent_bits), range(2**mantissa_bits)):
        if dtype is E4M3 and (exponent, mantissa) == (15, 7):
            continue  # NaN
        if dtype is E5M2 and exponent == 31:
            continue  # infinities and NaN
        fraction = mantissa / 2**mantissa_bits
        found.append((1 + fraction if exponent else fraction) * 2.0 ** (max(exponent, 1) - bias))
    return torch.tensor(sorted({*found, *(-x for x in found)}), dtype=torch.float64)


def rounded(rows, dtype):
    """Rows as float8 with a scale for each holds them: the nearest of all its numbers, in float64."""
    numbers = representable(dtype)
    scale = rows.double().abs().amax(1, keepdim=True) / numbers[-1]
    at = (rows.double() / scale)[..., None]
    return numbers[(at - numbers).abs().argmin(-1)] * scale


def layer(inner=32, outer=48, seed=0):
    torch.manual_seed(seed)
    linear = Linear(inner, outer)
    torch.nn.init.normal_(linear.bias)
    linear.__class__ = fp8.Fp8Linear
    x = torch.randn(3, 5, inner) * torch.logspace(-3, 3, 15).view(3, 5, 1)  # rows of very different sizes
    return linear, x.bfloat16()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_numbers_are_the_nearest_of_the_format(dtype):
    rows = torch.randn(20, 200) * torch.logspace(-20, 20, 20)[:, None]
    number, scale = precision.quantise(rows, dtype)
    assert (number.dtype, scale.dtype, tuple(scale.shape)) == (dtype, torch.float32, (20, 1))
    got, want = number.double() * scale.double(), rounded(rows, dtype)
    off = (got - want).abs() / want.abs().amax(1, keepdim=True)
    # scales have 24 bits; a number halfway between two may go either way
    assert (off > 1e-6).double().mean() < 1e-3
    assert off.max() < 2.0 ** (-3 if dtype is E4M3 else -2)
    assert number.float().abs().amax(1).tolist() == [float(torch.finfo(dtype).max)] * 20


def test_rows_of_zeros_and_numbers_without_end():
    rows = torch.ones(4, 16)
    rows[0], rows[1], rows[2, 3], rows[3, 5] = 0.0, 1e-38, float("inf"), float("nan")
    linear, _ = layer(16, 16)
    y = linear(rows)
    assert torch.equal(y[:2], linear.bias.bfloat16().expand(2, -1))
    assert y[2:].isnan().all()


def test_each_product_is_of_factors_rounded_along_its_sum():
    """Forward e4m3 times e4m3, gradients e5m2 times e4m3, each with a scale for every row and column, in float64."""
    linear, x = layer()
    x.requires_grad_()
    y = linear(x)
    grad = torch.randn(y.shape) * torch.logspace(2, -2, 15).view(3, 5, 1)
    grad_x, grad_weight, grad_bias = torch.autograd.grad(y, (x, linear.weight, linear.bias), grad.bfloat16())
    rows, back = x.detach().flatten(0, 1), grad.bfloat16().flatten(0, 1)
    weight = linear.weight.detach()
    want = {
        "y": rounded(rows, E4M3) @ rounded(weight, E4M3).t() + linear.bias.detach().bfloat16().double(),
        "x": rounded(back, E5M2) @ rounded(weight.t(), E4M3).t(),
        "weight": rounded(back.t(), E5M2) @ rounded(rows.t(), E4M3).t(),
        "bias": back.double().sum(0),
    }
    for (name, exact), got in zip(want.items(), (y, grad_x, grad_weight, grad_bias), strict=True):
        got = got.detach().double().reshape(exact.shape)
        # each row to bfloat16's 8 bits, but where a number of 8 bits was halfway between two of float8
        off = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert off.median() < 2.0**-8, name
        assert off.max() < 0.1, name
    assert (grad_x.dtype, grad_weight.dtype, grad_bias.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_it_approximates_the_layer():
    """e4m3 is off by up to 2^-4 of each number, 2.6 % on average: two factors, independently."""
    linear, x = layer(64, 48)
    exact = x.double() @ linear.weight.detach().double().t() + linear.bias.detach().double()
    off = (linear(x).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 0.001 < off.mean() < 0.05


def test_autocast_does_not_round_the_scales():
    linear, x = layer()
    with torch.autocast("cpu", torch.bfloat16):
        inside = linear(x)
    assert torch.equal(inside, linear(x))


def test_a_second_derivative_is_refused():
    linear, x = layer()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(linear(x).float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().sum().backward()


def test_compiled_in_one_graph_it_gives_the_same_bits():
    linear, x = layer()
    x.requires_grad_()
    compiled = torch.compile(lambda rows: linear(rows), fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(x).float().square().sum(), (x, linear.weight)) for f in (compiled, linear))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.fixture
def on_a_cpu(monkeypatch):
    """As if a CPU multiplied float8 fast."""
    monkeypatch.setattr(importlib.import_module("lfm_fast.models.optimize"), "why_not", lambda *arguments: None)


@pytest.fixture(scope="module")
def flow():
    """A network that was trained."""
    return lfm_fast.LatentFlow.from_pretrained("embedded").model


def inputs(count=3):
    return torch.linspace(0.1, 0.9, count), lfm_fast.noise(count, (4, 16, 16), seed=0), torch.arange(count)


def error(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_network_in_float8(flow, mode, on_a_cpu):
    t, z, y = inputs()
    with torch.no_grad():
        want = copy.deepcopy(flow).double()(t.double(), z.double(), y)
        fast = lfm_fast.optimize(flow, "fp8", mode=mode)
        off, bf16 = (error(n(t, z, y), want) for n in (fast, lfm_fast.optimize(flow, "bf16", mode=mode)))
    assert bf16 < off < 0.1  # sixteen times bfloat16's steps, through five blocks
    kind = fp8.PackedLinearFp8 if mode == "inference" else fp8.Fp8Linear
    names = {name.split(".", 2)[2] for name, m in fast.named_modules() if isinstance(m, kind)}
    assert names == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    assert {n: v.shape for n, v in fast.state_dict().items()} == {n: v.shape for n, v in flow.state_dict().items()}


def test_its_state_dict_goes_through(flow, on_a_cpu):
    fast, other = (lfm_fast.optimize(flow, "fp8") for _ in range(2))
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(fast.state_dict())
    assert torch.equal(other(*inputs()), fast(*inputs()))


def test_training_shares_the_parameters_and_its_gradients_point_the_same_way(flow, on_a_cpu):
    model = copy.deepcopy(flow).train()
    fast = lfm_fast.optimize(model, "fp8", mode="training")
    assert all(ours is theirs for ours, theirs in zip(fast.parameters(), model.parameters(), strict=True))
    assert not any(isinstance(module, fp8.Fp8Linear) for module in model.modules())
    wanted = [p for p in model.parameters() if p.requires_grad]
    t, z, y = inputs()
    got, want = (torch.autograd.grad(n(t, z, y).float().square().sum(), wanted) for n in (fast, model))
    got, want = (torch.cat([g.flatten() for g in gradients]) for gradients in (got, want))
    assert torch.nn.functional.cosine_similarity(got, want, dim=0) > 0.99


def test_without_float8_it_is_refused(flow):
    for mode in ("inference", "training"):
        with pytest.raises(ValueError, match="fp8 exists on CUDA devices only, and this is a cpu; PyTorch would"):
            lfm_fast.optimize(flow, "fp8", mode=mode)


def test_a_gpu_whose_product_fails_is_refused_with_its_reason(monkeypatch):
    def fail(*factors):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")

    monkeypatch.setattr(precision, "product", fail)
    said = precision._why_no_float8.__wrapped__(CPU)
    assert "but here it fails (CUBLAS_STATUS_NOT_SUPPORTED); use bf16" in said
    monkeypatch.undo()
    assert precision._why_no_float8.__wrapped__(CPU) is None  # the product does run on a CPU


def test_sizes_that_do_not_fit_are_refused(on_a_cpu):
    model = lfm_fast.create_model("DiT-Emoji/2", image_size=64, hidden_size=40, num_heads=2)
    with pytest.raises(ValueError, match="multiples of 16, but a layer has 40 inputs and 120 outputs; use bf16"):
        lfm_fast.optimize(model, "fp8")
