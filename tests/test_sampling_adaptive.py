"""lfm_fast.sample with adaptive methods: labels, scales and counts go with their sample, whoever else is there."""

import math

import pytest
import torch

import lfm_fast
from lfm_fast.models import DiT
from lfm_fast.solvers.per_sample import bucket

B, NULL = 7, 9
Y = torch.tensor([0, 5, 1, 8, 3, 0, 6])
SCALE = torch.tensor([1.0, 2.0, 1.5, 1.0, 3.0, 0.5, 2.0])
METHODS = ["dopri5", "dopri8", "bosh3", "adaptive_heun", "tsit5"]


class Model:
    """v = (y + 1/2) ((t - 1/2) z + t^2): products and sums, which round alike in every batch; the larger a label, the
    more steps. Keeps the size of each call."""

    def __init__(self):
        self.sizes = []

    def __call__(self, t, z, y=None, gain=None):
        self.sizes.append(len(z))
        speed = 4.0 if y is None else y.to(z.dtype).reshape(-1, *[1] * (z.ndim - 1)) + 0.5
        t = t.reshape(-1, *[1] * (z.ndim - 1))
        velocity = speed * ((t - 0.5) * z + t * t)
        return velocity if gain is None else velocity * gain


def start(dtype=torch.float32):
    return lfm_fast.noise(B, (2, 5), seed=3).to(dtype)


def solve(rows=slice(None), model=None, z1=None, **settings):
    told = {"y": Y[rows], "method": "dopri5", "return_stats": True, "atol": 1e-4, "rtol": 1e-4, **settings}
    if isinstance(told.get("guidance_scale"), torch.Tensor):
        told["guidance_scale"] = told["guidance_scale"][rows]
    return lfm_fast.sample(model or Model(), (start() if z1 is None else z1)[rows], **told)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "guided",
    [
        {},
        {"guidance_scale": 2.0, "null_label": NULL},
        {"guidance_scale": 2.0},
        {"guidance_scale": SCALE, "null_label": NULL},
        {"guidance_scale": SCALE, "guidance_interval": (0.2, 0.7), "null_label": NULL},
    ],
    ids=["plain", "joint", "apart", "by sample", "by sample, inside an interval"],
)
def test_labels_and_scales_follow_their_sample_to_the_last_bit(method, guided):
    model = Model()
    told = {"method": method, **guided}
    if method == "adaptive_heun":
        told.update(atol=1e-2, rtol=1e-2)
    z0, stats = solve(model=model, **told)
    assert stats.nfe.unique().numel() > 1
    assert len(set(model.sizes)) > 1  # the batch did shrink
    assert stats.calls == len(model.sizes)
    assert int(stats.forwards.sum()) == sum(model.sizes)
    for row in range(B):
        rows = slice(row, row + 1)
        alone, its = solve(rows, **told)
        assert torch.equal(alone, z0[rows])
        for name in ("nfe", "accepted", "rejected", "reached"):
            assert torch.equal(getattr(its, name), getattr(stats, name)[rows]), name
        assert its.forwards <= stats.forwards[rows]  # the rows that it rode along with others are counted, too


def test_forwards_are_the_rows_that_were_computed():
    _, stats = solve(guidance_scale=SCALE, null_label=NULL)
    factor = torch.where(SCALE == 1, 1, 2)
    rounds = int(stats.nfe.max())
    still = [min(B, bucket(int((stats.nfe > n).sum()))) for n in range(rounds)]
    assert ((stats.forwards >= factor * stats.nfe) & (stats.forwards <= factor * rounds)).all()
    _, plain = solve()
    still = [min(B, bucket(int((plain.nfe > n).sum()))) for n in range(int(plain.nfe.max()))]
    assert int(plain.forwards.sum()) == sum(still)
    assert plain.calls == plain.nfe.max()


def test_with_further_arguments_the_whole_batch_stays():
    gain = torch.linspace(0.5, 2.0, B)[:, None, None]
    model = Model()
    z0, stats = solve(model=model, model_kwargs={"gain": gain})
    assert set(model.sizes) == {B}
    assert stats.nfe.unique().numel() > 1
    assert torch.equal(stats.forwards, stats.nfe.max().expand(B))
    for row in range(B):
        rows = slice(row, row + 1)
        alone, its = solve(rows, model_kwargs={"gain": gain[rows]})
        assert torch.equal(alone, z0[rows])
        assert torch.equal(its.nfe, stats.nfe[rows])


@pytest.mark.parametrize("method", ["dopri5", "adams"])
def test_a_network_solves_a_batch_as_it_solves_its_samples(method):
    torch.manual_seed(0)
    model = DiT(image_size=8, hidden_size=64, depth=2, num_heads=2, num_classes=9, label_dropout=0.1).eval()
    for parameter in model.parameters():  # a new DiT is the zero velocity
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.12)
    z1 = lfm_fast.noise(B, (4, 8, 8), seed=2)
    z1[:3] *= torch.tensor([8.0, 0.1, 3.0])[:, None, None, None]  # so that they take different numbers of steps
    told = {"guidance_scale": SCALE, "null_label": NULL, "model": model, "z1": z1, "method": method}
    z0, stats = solve(atol=1e-5, rtol=1e-5, **told)
    assert (z0 - z1).abs().max() > 0.5
    assert stats.nfe.unique().numel() > 1
    for row in range(B):
        alone, its = solve(slice(row, row + 1), atol=1e-5, rtol=1e-5, **told)
        # a matrix product may sum in another order for another batch, and a step's size follows its error
        torch.testing.assert_close(alone[0], z0[row], rtol=0, atol=1e-4)
        assert abs(int(its.nfe) - int(stats.nfe[row])) <= 12
    exact = solve(atol=1e-7, rtol=1e-7, **{**told, "model": model.double(), "z1": z1.double(), "method": "dopri8"})[0]
    size = exact.flatten(1).abs().max(1).values
    assert ((z0 - exact).flatten(1).abs().max(1).values < 50 * 1e-5 * size.clamp(min=1)).all()


def test_the_callback_and_the_bar_know_every_sample_and_false_ends_it(capsys):
    seen = []

    def watch(step, t, z):
        seen.append((step, t, z))
        return step < 3 or None  # False at the third round

    def stop(step, t, z):
        return step < 3

    z0, stats = solve(callback=watch, progress=True)
    rounds = int((stats.accepted + stats.rejected).max())
    assert [step for step, _, _ in seen] == list(range(1, rounds + 1))
    assert all((t.shape, t.dtype, z.shape) == ((B,), torch.float64, (B, 2, 5)) for _, t, z in seen)
    assert seen[-1][1].tolist() == [0.0] * B
    assert torch.equal(seen[-1][2], z0)
    assert "sampling" in capsys.readouterr().err
    part, stats = solve(callback=stop)  # a warning would be an error
    assert torch.equal(part, seen[2][2])
    assert torch.equal(stats.reached, seen[2][1] == 0.0)
    assert stats.nfe.max() == 2 + 6 * 3


def test_a_budget_is_of_each_sample():
    free, stats = solve(rtol=1e-6, atol=1e-6)
    budget = int(stats.nfe.median())
    with pytest.warns(UserWarning, match=r"dopri5 used its max_nfe = .* of 7 samples are returned as they are at t = "):
        z0, short = solve(rtol=1e-6, atol=1e-6, max_nfe=budget)
    assert torch.equal(short.reached, stats.nfe <= budget)
    assert 0 < int(short.reached.sum()) < B
    assert torch.equal(z0[short.reached], free[short.reached])
    assert (short.nfe <= budget).all()


def test_compat_keeps_what_torchdiffeq_has():
    for method in ("dopri5", "bosh3", "fehlberg2"):
        z0, stats = solve(method=method, compat="lfm")
        assert stats.nfe.unique().numel() == 1  # one step size for all
        assert torch.equal(z0, solve(method=f"torchdiffeq:{method}", compat="lfm")[0])
    ours, stats = solve(method="tsit5", compat="lfm")
    assert stats.nfe.unique().numel() > 1
    assert torch.equal(ours, solve(method="tsit5")[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_velocity_that_is_not_finite_is_one_sentence(method):
    def model(t, z, y):
        velocity = Model()(t, z, y)
        velocity[(y == 8) & (t < 0.6)] = math.nan
        return velocity

    with pytest.raises(
        RuntimeError, match=r"^The velocity of sample 3 at t = 0\.[0-5].* is not finite .*\.$"
    ) as caught:
        solve(model=model, method=method, atol=1e-2, rtol=1e-2)
    assert "\n" not in str(caught.value)


def test_a_trajectory_follows_each_sample():
    states, stats = solve(trajectory=True, num_steps=9)
    z0, plain = solve()
    assert torch.equal(states[-1], z0)
    assert torch.equal(stats.nfe, plain.nfe)
    fine = solve(trajectory=True, num_steps=9, method="rk4", time_grid=torch.linspace(1, 0, 9 * 40 + 1), z1=start())[0]
    torch.testing.assert_close(states, fine[::40], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="leave one of the two out"):
        solve(trajectory=True, max_nfe=50)


def test_the_host_knows_the_times_that_an_interval_asks_for(monkeypatch):
    """On a GPU reading them back would wait for all work before."""
    told = {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.7), "null_label": NULL}
    z0, stats = solve(**told)
    monkeypatch.setattr(torch.Tensor, "tolist", None)  # what reads t
    again, its = solve(**told)
    monkeypatch.undo()
    assert torch.equal(again, z0)
    assert torch.equal(its.forwards, stats.forwards)
    assert (stats.forwards < 2 * stats.nfe).any()
