"""How the model is called: which memory it is given, in one forward or two, and what is counted."""

import pytest
import torch
from torch import nn

import lfm_fast
from lfm_fast.guidance import GuidedField, LinearGuidance, Network, joining
from lfm_fast.models import DiT
from lfm_fast.ops import _measured

B, NULL = 4, 9
Z = torch.randn(B, 2, 3, generator=torch.Generator().manual_seed(0))
T = torch.full((B,), 0.5)
Y = torch.tensor([1, 2, 3, 4])


def test_a_model_that_leaves_its_inputs_alone_is_given_them_as_they_are():
    seen = []

    def model(t, z, y):
        seen.append((t.data_ptr(), z.data_ptr(), y.data_ptr()))
        return z * 2

    z, t, y = Z.clone(), T.clone(), Y.clone()
    network = Network(model, z, y)
    own = (t.data_ptr(), z.data_ptr(), y.data_ptr())
    for _ in range(3):
        network.conditional(t, z)
    assert all(a != b for a, b in zip(seen[0], own))  # the first call shows what it does, on copies
    assert seen[1:] == [own, own]


@pytest.mark.parametrize(
    "method", ["rk4", "ab3", "abm5", "unipc", "sde_heun", "dopri5", "bosh3", "adams", "torchdiffeq:rk4"]
)
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_what_a_model_was_given_it_may_keep(method, scale):
    kept = []

    def model(t, z, y=None):
        kept.append([(x, x.clone()) for x in (t, z, y) if x is not None])
        return torch.sin(5 * z) * t[:, None, None]

    settings = {"y": Y, "guidance_scale": scale, "method": method, "num_steps": 5, "trajectory": True}
    lfm_fast.sample(model, Z, **settings)
    assert len(kept) > 4
    for inputs in kept:
        for x, as_it_was in inputs:
            assert torch.equal(x, as_it_was)


def on_tensor(x):
    x.mul_(2)


def on_a_view(x):
    x.view(-1)[0] = 7


def on_detached(x):
    x.detach().add_(1)


def on_data(x):
    x.data.add_(1)


def on_numpy(x):
    x.numpy()[...] = 3


def on_nothing_yet(x):
    x.clamp_(-1000, 1000)  # in place, though nothing changes here


@pytest.mark.parametrize("write", [on_tensor, on_a_view, on_detached, on_data, on_numpy, on_nothing_yet])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_that_writes_to_an_input_gets_copies(write, which, mode):
    def model(*inputs):
        t, z, y = inputs
        velocity = z * t[:, None, None] + y[:, None, None]
        write(inputs[which])
        return velocity

    with mode():
        z, t, y = Z.clone(), T.clone(), Y.clone()
        network = Network(lambda t, z, y: model(t, z, y), z, y, NULL)
        for _ in range(3):
            expected = z * t[:, None, None] + Y[:, None, None]
            torch.testing.assert_close(network.conditional(t, z), expected)
            velocity, other = network.both(t, z)
            torch.testing.assert_close(velocity, expected)
            torch.testing.assert_close(other, z * t[:, None, None] + NULL)
        assert torch.equal(z, Z)
        assert torch.equal(t, T)
        assert torch.equal(y, Y)


@pytest.mark.parametrize("write", [on_tensor, on_a_view, on_detached])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_model_that_starts_to_write_later_is_stopped_in_one_sentence(write, which):
    calls = []

    def model(*inputs):
        calls.append(1)
        velocity = 2 * inputs[1]
        if len(calls) == 3:
            write(inputs[which])
        return velocity

    network = Network(lambda t, z, y: model(t, z, y), Z, Y.clone())
    z = Z.clone()
    for _ in range(2):
        network.conditional(T.clone(), z)
    with pytest.raises(RuntimeError, match="let it write to a copy of its own") as caught:
        network.conditional(T.clone(), z)
    assert "\n" not in str(caught.value)


def test_a_model_may_write_to_what_is_made_for_it_alone():
    def model(t, z, y=None):
        if len(z) == 2 * B:  # both put together
            t.zero_()
            return z.mul_(2)
        return 2 * z

    network = Network(model, Z, Y, NULL)
    for _ in range(3):
        assert torch.equal(network.conditional(T, Z), 2 * Z)
        assert torch.equal(network.both(T, Z)[0], 2 * Z)


def test_a_result_that_is_the_input_is_no_harm():
    for method in ("rk4", "ab3", "unipc", "dopri5"):
        settings = {"method": method, "num_steps": 8, "trajectory": True}
        found = lfm_fast.sample(lambda t, z: z, Z, **settings)
        torch.testing.assert_close(found, lfm_fast.sample(lambda t, z: z.clone(), Z, **settings), rtol=0, atol=0)


@pytest.mark.parametrize("joint", [True, False, None])
def test_both_velocities_come_from_one_forward_or_two_as_asked(joint):
    rows = []

    def model(t, z, y):
        rows.append((len(z), y.tolist()))
        return z * y[:, None, None]

    scale = torch.tensor([2.0, 1.0, 3.0, 0.0])
    field = GuidedField(Network(model, Z, Y, NULL), LinearGuidance(scale, joint=joint))
    velocity, other, _ = field(T, Z)
    torch.testing.assert_close(velocity, Z * Y[:, None, None])
    assert torch.equal(other[1], velocity[1])
    torch.testing.assert_close(other[[0, 2, 3]], NULL * Z[[0, 2, 3]])
    together = [(7, [1, 2, 3, 4, NULL, NULL, NULL])]
    assert rows == ([(4, [1, 2, 3, 4]), (3, [NULL] * 3)] if joint is False else together)
    assert field.network.calls == len(rows)
    assert field.network.forwards.tolist() == [2, 1, 2, 2]


def dit():
    torch.manual_seed(0)
    model = DiT(image_size=4, hidden_size=24, depth=1, num_heads=2, num_classes=5, label_dropout=0.1).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What is measured is what a test says; nothing of it stays."""
    monkeypatch.setenv("LFM_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_measured, "_known", {})
    monkeypatch.setattr(_measured, "_file", lambda table, *_: str(tmp_path / f"{table}.json"))
    found = {"runs": 0, "joint": 1.0, "apart": 1.0}

    def seconds(run, device):
        run()
        found["runs"] += 1
        return found[("joint", "apart")[(found["runs"] - 1) % 2]]

    monkeypatch.setattr(_measured, "_seconds", seconds)
    return found


@pytest.mark.parametrize("method", ["heun", "dopri5"])
@pytest.mark.parametrize(("apart", "calls"), [(1.0, 1), (0.97, 1), (0.9, 2)])
def test_a_network_is_called_as_was_measured_once_and_the_rest_stays_as_it_is(
    measured, monkeypatch, method, apart, calls
):
    measured["apart"] = apart
    z1 = lfm_fast.noise(B, (4, 4, 4), dtype=torch.float64)
    settings = {"y": Y, "null_label": 5, "guidance_scale": 2.0, "method": method, "num_steps": 3, "return_stats": True}
    settings |= {"atol": 1e-3, "rtol": 1e-3}
    monkeypatch.setenv("LFM_FAST_MEASURE", "auto")  # never on a CPU
    expected, plain = lfm_fast.sample(dit(), z1, **settings)
    assert measured["runs"] == 0
    assert plain.calls == plain.nfe.max()
    monkeypatch.setenv("LFM_FAST_MEASURE", "always")
    for _ in range(2):
        found, stats = lfm_fast.sample(dit(), z1, **settings)
        # products of other shapes may be summed in another order
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        assert stats.calls == calls * stats.nfe.max()
        assert torch.equal(stats.forwards, plain.forwards)
        kinds = measured["runs"]
        assert kinds >= 2  # each way, for every bucket of batch sizes that an adaptive method comes to
    monkeypatch.setattr(_measured, "_known", {})  # another process
    monkeypatch.setenv("LFM_FAST_MEASURE", "never")
    assert lfm_fast.sample(dit(), z1, **settings)[1].calls == stats.calls
    assert measured["runs"] == kinds


def test_only_a_network_that_says_what_it_is_is_called_more_often_than_asked(measured, monkeypatch):
    monkeypatch.setenv("LFM_FAST_MEASURE", "always")
    calls = []

    def model(t, z, y):
        calls.append(len(z))
        return z

    lfm_fast.sample(model, Z, y=Y, null_label=NULL, guidance_scale=2.0, method="euler", num_steps=3)
    assert calls == [2 * B] * 3
    assert measured["runs"] == 0
    assert joining._CLEARLY < 1


def test_a_network_beside_another_is_counted_with_it():
    network = Network(lambda t, z, y: z, Z, Y)
    other = network.beside(torch.neg)
    assert network.beside(torch.neg) is other
    weak = network.beside(lambda t, z, y: 3 * z)
    network.conditional(T, Z)
    assert torch.equal(weak.conditional(T, Z), 3 * Z)
    assert (network.calls, weak.calls, network.forwards.tolist()) == (2, 2, [2] * B)
