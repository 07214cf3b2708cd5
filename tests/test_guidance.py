"""Guidance: which forwards are made for whom, and what the blend is."""

import pytest
import torch
from torch import nn

from lfm_fast.guidance import GuidedField, LinearGuidance, Network

B, NULL = 4, 9
Z = torch.randn(B, 2, 3, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([1, 2, 3, 4])


class Model:
    """v = t z + y (0 without a label), so that each row tells its time, state and label; keeps every call."""

    def __init__(self):
        self.calls = []

    def __call__(self, t, z, y=None, shift=0.0):
        self.calls.append((t.clone(), z, y))
        labels = torch.zeros(len(z)) if y is None else y.float()
        return t[:, None, None] * z + labels[:, None, None] + shift


def field(model, scale=1.0, interval=(0.0, 1.0), y=Y, null_label=NULL, model_kwargs=None):
    return GuidedField(Network(model, Z, y, null_label, model_kwargs), LinearGuidance(scale, interval))


def blend(velocity, unconditional, scale):
    s = 1.0 if scale is None else scale[:, None, None]
    return velocity if unconditional is None else s * velocity + (1 - s) * unconditional


def expected(t, scale, null=float(NULL)):
    """t z + scale y + (1 - scale) null, both sides per sample."""
    return t[:, None, None] * Z + (scale * Y + (1 - scale) * null)[:, None, None]


TIMES = torch.tensor([0.9, 0.5, 0.3, 0.1])


def test_scale_one_is_one_forward_and_no_blend():
    model = Model()
    guided = field(model)
    velocity, unconditional, scale = guided(TIMES, Z)
    assert unconditional is None
    assert scale is None
    torch.testing.assert_close(velocity, expected(TIMES, torch.ones(B)))
    assert len(model.calls) == 1
    assert guided.network.forwards.tolist() == [1] * B
    assert guided.nfe == 1


def test_a_null_label_makes_one_forward_of_both():
    model = Model()
    guided = field(model, 2.5)
    velocity, unconditional, scale = guided(TIMES, Z)
    torch.testing.assert_close(blend(velocity, unconditional, scale), expected(TIMES, torch.full((B,), 2.5)))
    (t, z, y) = model.calls[0]
    assert len(model.calls) == 1
    assert y.tolist() == [1, 2, 3, 4] + [NULL] * B
    assert torch.equal(t, TIMES.repeat(2))
    assert torch.equal(z, torch.cat([Z, Z]))
    assert guided.network.calls == 1
    assert guided.network.forwards.tolist() == [2] * B
    assert guided.nfe == 1


def test_without_a_null_label_the_unconditional_call_has_y_none():
    model = Model()
    guided = field(model, 2.5, null_label=None)
    result = blend(*guided(TIMES, Z))
    torch.testing.assert_close(result, expected(TIMES, torch.full((B,), 2.5), null=0.0))
    assert [y is None for _, _, y in model.calls] == [False, True]
    assert guided.network.forwards.tolist() == [2] * B

    def strict(t, z, y):  # y has no default: it has to be passed
        return z if y is None else 2 * z

    torch.testing.assert_close(blend(*field(strict, 3.0, null_label=None)(TIMES, Z)), 4 * Z)


def test_a_model_without_labels_is_called_without_y():
    assert torch.equal(field(lambda t, z: 2 * z, y=None, null_label=None)(TIMES, Z)[0], 2 * Z)


@pytest.mark.parametrize("null_label", [NULL, None])
def test_one_scale_per_sample_computes_only_the_rows_it_needs(null_label):
    scale = torch.tensor([1.0, 2.0, 1.0, -0.5])
    guided = field(Model(), scale, null_label=null_label)
    result = blend(*guided(TIMES, Z))
    torch.testing.assert_close(result, expected(TIMES, scale, null=float(null_label or 0)))
    assert guided.network.forwards.tolist() == [1, 2, 1, 2]


def test_the_interval_skips_the_unconditional_forward_for_the_whole_batch():
    guided = field(Model(), 2.0, (0.3, 0.8))
    for time, rows in ((1.0, 1), (0.8001, 1), (0.8, 2), (0.5, 2), (0.3, 2), (0.2999, 1), (0.0, 1)):
        before = guided.network.forwards.clone()
        t = torch.full((B,), time)
        result = blend(*guided.at(time)(t, Z))
        assert (guided.network.forwards - before).tolist() == [rows] * B, time
        torch.testing.assert_close(result, expected(t, torch.full((B,), 2.0 if rows == 2 else 1.0)))
        torch.testing.assert_close(blend(*guided(t, Z)), result, rtol=0, atol=0)  # the same where it has to look at t
    assert guided.nfe == 14


@pytest.mark.parametrize("null_label", [NULL, None])
def test_the_interval_holds_for_each_sample_at_its_own_time(null_label):
    scale = torch.tensor([3.0, 3.0, 1.0, 2.0])
    guided = field(Model(), scale, (0.2, 0.6), null_label=null_label)
    result = blend(*guided(TIMES, Z))
    used = torch.tensor([1.0, 3.0, 1.0, 1.0])  # times 0.9, 0.5, 0.3, 0.1
    torch.testing.assert_close(result, expected(TIMES, used, null=float(null_label or 0)))
    assert guided.network.forwards.tolist() == [1, 2, 1, 1]
    later = TIMES - 0.2  # other samples are inside now: 0.7, 0.3, 0.1, -0.1; nothing of the last call is left over
    torch.testing.assert_close(
        blend(*guided(later + 0.1, Z)),
        expected(later + 0.1, torch.tensor([1.0, 3.0, 1.0, 1.0]), null=float(null_label or 0)),
    )
    inside = torch.full((B,), 0.4)
    torch.testing.assert_close(blend(*guided(inside, Z)), expected(inside, scale, null=float(null_label or 0)))


def test_further_arguments_are_never_cut_or_doubled():
    shift = torch.arange(4.0)[:, None, None]
    scale = torch.tensor([1.0, 2.0, 1.0, 2.0])
    guided = field(Model(), scale, (0.2, 1.0), model_kwargs={"shift": shift})
    used = torch.tensor([1.0, 2.0, 1.0, 1.0])
    torch.testing.assert_close(blend(*guided(TIMES, Z)), expected(TIMES, used) + shift)
    assert guided.network.forwards.tolist() == [2] * B  # both calls on the whole batch, and counted so
    assert guided.network.calls == 2


class Recorder(nn.Module):
    """A network that insists on its weights' type, as a plain Linear does."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=dtype)
        self.seen = None

    def forward(self, t, z, y=None):
        self.seen = (t.dtype, z.dtype)
        return self.linear(z)


@pytest.mark.parametrize(
    ("weights", "state", "time", "velocity"),
    [
        (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),  # the fused step reads half precision
        (torch.float16, torch.float32, torch.float32, torch.float16),
        (torch.float64, torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.float64, torch.float32, torch.float64),
        (torch.bfloat16, torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float32, torch.float32, torch.float32),
    ],
)
def test_the_model_gets_its_own_type_and_the_state_keeps_its_own(weights, state, time, velocity):
    model = Recorder(weights)
    network = Network(model, Z.to(state))
    with torch.no_grad():
        assert network.conditional(TIMES.to(state), Z.to(state)).dtype == velocity
    assert model.seen == (time, weights)


def test_a_model_may_scale_its_times_in_place():
    def in_place(t, z):
        t *= 1000
        return z * t[:, None, None]

    t = torch.tensor(0.5)
    torch.testing.assert_close(field(in_place, y=None)(t.expand(B), Z)[0], 500 * Z)


@pytest.mark.parametrize(("null_label", "scale"), [(None, 1.0), (None, 2.0), (NULL, 2.0)])
@pytest.mark.parametrize("batch_size", [1, B])
def test_a_model_may_write_to_its_inputs(batch_size, null_label, scale):
    def in_place(t, z, y=None):
        z *= 1000 * t[:, None, None]
        t.zero_()
        if y is not None:
            z += y[:, None, None]
            y.zero_()
        return z

    t, z, y = torch.tensor(0.5).expand(batch_size), Z[:batch_size].clone(), Y[:batch_size].clone()
    guided = GuidedField(Network(in_place, z, y, null_label), LinearGuidance(scale))
    wanted = 500 * Z[:batch_size] + (scale * Y[:batch_size] + (1 - scale) * (null_label or 0))[:, None, None]
    for _ in range(2):
        torch.testing.assert_close(blend(*guided(t, z)), wanted)
        assert torch.equal(z, Z[:batch_size])
        assert torch.equal(y, Y[:batch_size])
        assert t.tolist() == [0.5] * batch_size


@pytest.mark.parametrize("null_label", [NULL, None])
def test_a_model_may_return_the_same_memory_every_time(null_label):
    buffers, model = {}, Model()

    def static(t, z, y=None):
        return buffers.setdefault(len(z), torch.empty_like(z)).copy_(model(t, z, y))

    result = blend(*field(static, 2.5, null_label=null_label)(TIMES, Z))
    torch.testing.assert_close(result, expected(TIMES, torch.full((B,), 2.5), null=float(null_label or 0)))


class Output:
    sample = Z


@pytest.mark.parametrize(
    ("velocity", "message"),
    [
        ((Z,), "returned 'tuple'.*wrap the model"),
        ({"sample": Z}, "returned 'dict'.*wrap the model"),
        (Output(), "returned 'Output'.*wrap the model"),
        (None, "returned 'NoneType', expected a tensor"),
        (Z.numpy(), "returned 'ndarray', expected a tensor"),
        (Z.to(torch.complex64), "velocity of torch.complex64"),
        (Z.to(torch.int64), "velocity of torch.int64"),
        (Z > 0, "velocity of torch.bool"),
    ],
)
def test_what_is_no_velocity_is_refused(velocity, message):
    with pytest.raises(ValueError, match=message):
        field(lambda t, z: velocity, y=None)(TIMES, Z)


def test_a_velocity_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"velocity \(4, 2, 6\) for a state \(4, 2, 3\)"):
        field(lambda t, z: torch.cat([z, z], -1), y=None)(TIMES, Z)
