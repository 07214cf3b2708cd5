"""flow_matching_loss: its value, its gradient, what makes it reproducible, what it refuses."""

import pytest
import torch
from torch import nn

import lfm_fast
from lfm_fast.flow.paths import Linear, VarianceExploding, VariancePreserving, VariancePreservingTrig

PATHS = [Linear(), Linear(1e-5), VariancePreserving(), VariancePreservingTrig(), VarianceExploding(0.1, 5.0)]


class Net(nn.Module):
    """A velocity with parameters that depends on t, z and y; keeps what it was called with."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(4, 4, generator=generator).to(dtype))
        self.table = nn.Parameter(torch.randn(5, 4, generator=generator).to(dtype))
        self.seen = None

    def forward(self, t, z, y=None, gain=1.0):
        self.seen = (t, z, y)
        v = torch.einsum("dc,bchw->bdhw", self.mix, z) * (1 + t)[:, None, None, None] * gain
        return v if y is None else v + self.table[y][:, :, None, None]


def latents(batch_size=6, dtype=torch.float32):
    return torch.randn(batch_size, 4, 3, 2, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_value_and_gradient_are_those_of_the_formula(path):
    z_0, z_1 = latents(dtype=torch.float64), lfm_fast.noise(6, (4, 3, 2), dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 6, dtype=torch.float64)
    y = torch.arange(6) % 5
    net = Net(torch.float64)
    loss = lfm_fast.flow_matching_loss(net, z_0, y, path=path, z_1=z_1, t=t)
    alpha, sigma, d_alpha, d_sigma = (
        f(t)[:, None, None, None] for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma)
    )
    expected = (net(t, alpha * z_0 + sigma * z_1, y) - (d_alpha * z_0 + d_sigma * z_1)).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, net.parameters()), torch.autograd.grad(3 * expected, net.parameters())
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_noise_and_times_come_from_seed_and_index():
    net, z_0, indices = Net(), latents(), torch.tensor([90, 4, 7, 2**40, 0, 5])
    whole = lfm_fast.flow_matching_loss(net, z_0, seed=3, indices=indices)
    t, z_t, _ = net.seen
    z_1 = lfm_fast.noise(6, (4, 3, 2), seed=3, indices=indices)
    torch.testing.assert_close(z_t, Linear().interpolate(z_0, z_1, t)[0], rtol=1e-6, atol=1e-6)  # float32, two products
    given = lfm_fast.flow_matching_loss(net, z_0, z_1=z_1, t=t)
    torch.testing.assert_close(whole, given, rtol=1e-6, atol=0)
    # the same samples in two batches, as two ranks draw them
    halves = [lfm_fast.flow_matching_loss(net, z_0[k::2], seed=3, indices=indices[k::2]) for k in (0, 1)]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-6, atol=0)


class Middle(Linear):
    """A path that is defined for some times only."""

    t_min, t_max = 0.25, 0.5


def test_every_sample_has_its_own_time_inside_the_path():
    net, z_0 = Net(), latents().repeat(100, 1, 1, 1)
    for path in (*PATHS, Middle()):
        lfm_fast.flow_matching_loss(net, z_0, path=path, seed=1)
        t = net.seen[0]
        assert t.shape == (600,)
        assert t.unique().numel() > 590
        assert t.min() >= path.t_min
        assert t.max() <= path.t_max


def test_a_seed_of_none_follows_torch():
    net, z_0 = Net(), latents()

    def draw():
        return [lfm_fast.flow_matching_loss(net, z_0).item() for _ in range(2)]

    torch.manual_seed(8)
    first = draw()
    torch.manual_seed(8)
    assert draw() == first
    assert first[0] != first[1]


def test_labels_and_further_arguments_reach_the_model():
    net, z_0, y = Net(), latents(), torch.tensor([0, 1, 2, 3, 4, 0], dtype=torch.int32)
    labelled = lfm_fast.flow_matching_loss(net, z_0, y, seed=0)
    assert net.seen[2].dtype == torch.int32
    assert torch.equal(net.seen[2], y)
    assert lfm_fast.flow_matching_loss(net, z_0, seed=0).item() != labelled.item()
    assert lfm_fast.flow_matching_loss(net, z_0, y, seed=0, model_kwargs={"gain": 2.0}).item() != labelled.item()
    lfm_fast.flow_matching_loss(lambda t, z: z, z_0, seed=0)  # a function without labels serves


def test_bfloat16_velocities_give_a_float32_loss():
    z_0 = latents()
    loss = lfm_fast.flow_matching_loss(lambda t, z: z.bfloat16(), z_0, seed=0)
    assert loss.dtype == torch.float32
    # one rounding of the velocity to 8 bits
    assert float(loss) == pytest.approx(float(lfm_fast.flow_matching_loss(lambda t, z: z, z_0, seed=0)), rel=4e-3)


def test_weights_multiply_the_loss_of_their_sample():
    net, z_0 = Net(), latents()
    t = torch.linspace(0.1, 0.9, 6)
    each = torch.stack(
        [lfm_fast.flow_matching_loss(net, z_0[i : i + 1], t=t[i : i + 1], z_1=-z_0[i : i + 1]) for i in range(6)]
    )
    weighted = lfm_fast.flow_matching_loss(net, z_0, t=t, z_1=-z_0, weighting=lambda t: 1 + t**2)
    torch.testing.assert_close(weighted, ((1 + t**2) * each).mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("name", ["data", "noise"])
def test_named_weights_make_the_loss_of_predicting_data_or_noise(path, name):
    net, z_0, z_1 = Net(torch.float64), latents(dtype=torch.float64), lfm_fast.noise(6, (4, 3, 2), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    loss = lfm_fast.flow_matching_loss(net, z_0, z_1=z_1, t=t, path=path, weighting=name)
    _, z_t, _ = net.seen
    convert, target = (path.data_from_velocity, z_0) if name == "data" else (path.noise_from_velocity, z_1)
    predicted = convert(net(t, z_t), z_t, t)
    torch.testing.assert_close(loss, (predicted - target).square().mean(), rtol=1e-10, atol=0)


def test_time_sampler_is_used():
    net = Net()
    lfm_fast.flow_matching_loss(net, latents(), seed=0, time_sampler=lambda index, seed: torch.full((6,), 0.25))
    assert net.seen[0].tolist() == [0.25] * 6


def refuse(*args, **kwargs):
    raise AssertionError("the model was called before the arguments were checked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"z_0": torch.zeros(6, dtype=torch.int64)}, "z_0 has to be a floating"),
        ({"z_0": [1.0]}, "z_0 has to be a floating"),
        ({"y": torch.zeros(6)}, "torch.float32, expected"),
        ({"y": torch.zeros(5, dtype=torch.int64)}, r"\(5,\) torch.int64, expected \(6,\)"),
        ({"y": torch.tensor([0, 1, -2, 0, 0, 0])}, "the label -2"),
        ({"path": "linear"}, "path is 'linear'"),
        ({"z_1": torch.zeros(6, 4)}, "z_1 is"),
        ({"z_0": torch.zeros(0, 4)}, r"z_0 is \(0, 4\) torch.float32, expected at least one sample"),
        ({"z_0": torch.zeros(6, 4).to(torch.float8_e4m3fn)}, "z_0 is .* torch.float8_e4m3fn, expected"),
        ({"z_1": [1.0]}, "z_1 is 'list'"),
        ({"z_1": torch.zeros(6, 4, 3, 2, dtype=torch.int64)}, "z_1 is .* torch.int64, expected floating"),
        ({"y": torch.zeros(6, dtype=torch.bool)}, "torch.bool, expected"),
        ({"y": torch.zeros(6, dtype=torch.complex64)}, "torch.complex64, expected"),
        ({"t": [0.5] * 6}, "t is 'list'"),
        ({"t": torch.full((6,), 1.5)}, r"t holds times outside \[0, 1\]"),
        ({"t": torch.full((6,), float("nan"))}, "or NaN"),
        ({"t": torch.zeros(6), "path": VariancePreserving()}, r"t holds times outside \[1e-05, 1\]"),
        ({"model": None}, "model is 'NoneType', expected a module or function"),
        ({"model_kwargs": [1]}, "model_kwargs is 'list'"),
        ({"model_kwargs": {"z": 1}}, "model_kwargs holds z"),
        ({"model_kwargs": {1: 1}}, "model_kwargs holds the key 1"),
        ({"indices": torch.arange(6) - 1}, "indices holds -1"),
        ({"time_sampler": ["uniform"]}, "Unknown time sampler"),
        ({"time_sampler": lambda index, seed: torch.zeros(5)}, r"time_sampler returned is \(5,\)"),
        ({"time_sampler": lambda index, seed: 0.5}, "time_sampler returned is 'float'"),
        ({"time_sampler": lambda index, seed: torch.full((6,), 2.0)}, "time_sampler returned holds times outside"),
        ({"weighting": ["data"]}, "Unknown weighting"),
        ({"weighting": lambda t: -t}, "a weight below 0 or NaN"),
        ({"weighting": lambda t: t * float("nan")}, "a weight below 0 or NaN"),
        ({"weighting": lambda t: 1.0}, "returned 'float', expected one weight per sample"),
        ({"weighting": lambda t: t.mean()}, "expected one weight per sample"),
        ({"t": torch.zeros(())}, "one time per sample"),
        ({"t": torch.zeros(6, dtype=torch.int64)}, "one time per sample"),
        ({"indices": torch.arange(5)}, "indices is"),
        ({"seed": -3}, "seed is -3"),
        ({"time_sampler": "beta"}, "Unknown time sampler 'beta'"),
        ({"weighting": "snr"}, "Unknown weighting 'snr'; there are data, noise"),
    ],
)
def test_errors_come_before_the_model(arguments, message):
    with pytest.raises(ValueError, match=message):
        lfm_fast.flow_matching_loss(**{"model": refuse, "z_0": latents(), **arguments})


def test_a_model_may_write_to_its_inputs():
    z_0, y, t = latents(), torch.arange(6), torch.linspace(0.1, 0.9, 6)
    kept = z_0.clone()

    def in_place(t, z, y):
        result = z * t[:, None, None, None]
        for given in (t, z, y):
            given.zero_()
        return result

    def polite(t, z, y):
        return z * t[:, None, None, None]

    for weighting in ("data", lambda t: 1 + t, lambda t: t.add_(1)):
        ours, expected = (
            lfm_fast.flow_matching_loss(model, z_0, y, t=t, seed=0, weighting=weighting) for model in (in_place, polite)
        )
        assert torch.equal(ours, expected)
        assert torch.equal(t, torch.linspace(0.1, 0.9, 6))
        assert torch.equal(y, torch.arange(6))
        assert torch.equal(z_0, kept)


@pytest.mark.parametrize("convert", [lambda z: (z,), lambda z: z.to(torch.complex64), lambda z: None])
def test_what_is_no_velocity_is_refused(convert):
    with pytest.raises(ValueError, match="The model returned"):
        lfm_fast.flow_matching_loss(lambda t, z: convert(z), latents())


def test_a_velocity_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"velocity \(6, 8, 3, 2\) for a state \(6, 4, 3, 2\)"):
        lfm_fast.flow_matching_loss(lambda t, z: torch.cat([z, z], 1), latents())
