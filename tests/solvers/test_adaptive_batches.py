"""A sample of an adaptive solve does not depend on its neighbours, to the last bit, nor on how the batch shrinks."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_fast.solvers import Settings, embedded, get_solver
from lfm_fast.solvers.attempt import Table
from lfm_fast.solvers.control import LARGEST, SAFETY, SHARE, SMALLEST, StepControl
from lfm_fast.solvers.per_sample import bucket

NAMES = ["adaptive_heun", "bosh3", "dopri5", "tsit5", "dopri8", "adams"]
B = 13


class Field:
    """v = a z (1 - z) + b t^2 z, a and b by sample: products and sums alone, which round alike wherever they stand."""

    def __init__(self, a, b, sizes, selects=True):
        self.a, self.b, self.sizes, self.selects = a, b, sizes, selects

    def __call__(self, t, z):
        assert len(t) == len(z) == len(self.a)
        self.sizes.append(len(z))
        t = t[:, None]
        return self.a * z * (1 - z) + self.b * t * t * z, None, None

    def select(self, numbers, index):
        assert index.tolist() == numbers
        assert self.selects  # the whole batch is asked, not a part of it
        return Field(self.a[index], self.b[index], self.sizes, selects=False)

    def rows(self, rows):
        return Field(self.a[rows], self.b[rows], [])


def problem(dtype=torch.float32, elements=37):
    """A field whose samples are more and more difficult, and states (B, elements)."""
    a, b = torch.linspace(0.1, 8, B, dtype=dtype)[:, None], torch.linspace(-3, 5, B, dtype=dtype)[:, None]
    z = torch.rand(B, elements, generator=torch.Generator().manual_seed(elements), dtype=dtype)
    return Field(a, b, []), z


def assert_same(whole, rows, part):
    """The samples `rows` of one solution are those of another, to the last bit and count."""
    assert torch.equal(whole.z[rows], part.z)
    for name in ("time", "nfe", "accepted", "rejected", "reached"):
        assert torch.equal(getattr(whole, name)[rows], getattr(part, name)), name
    if whole.states is not None:
        for a, b in zip(whole.states, part.states, strict=True):
            assert torch.equal(a[rows], b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("times", [[0.0, 1.0], [0.0, 0.2, 0.5, 0.7, 1.0]], ids=["ends", "trajectory"])
def test_a_batch_is_its_samples_one_by_one_to_the_last_bit(name, dtype, times):
    field, z = problem(dtype)
    tolerance = 1e-3 if name == "adaptive_heun" else 1e-5
    told = Settings(atol=tolerance, rtol=tolerance, trajectory=len(times) > 2)
    whole = get_solver(name).integrate(field, z, times, told)
    assert whole.accepted.unique().numel() > 3  # they do not step alike
    for row in range(B):
        rows = slice(row, row + 1)
        assert_same(whole, rows, get_solver(name).integrate(field.rows(rows), z[rows], times, told))
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    assert_same(whole, order, get_solver(name).integrate(field.rows(order), z[order], times, told))


@given(
    rows=st.lists(st.integers(0, B - 1), min_size=1, max_size=B),
    elements=st.sampled_from([1, 3, 16, 257, 5000]),
    budget=st.sampled_from([None, 20, 40]),
    name=st.sampled_from(NAMES[1:]),
)
@settings(max_examples=25, deadline=None)
def test_any_batch_of_any_samples_gives_the_same(rows, elements, budget, name):
    field, z = problem(elements=elements)
    told = Settings(atol=1e-4, rtol=1e-4, max_nfe=budget)
    whole = get_solver(name).integrate(field, z, [0.0, 1.0], told)
    some = get_solver(name).integrate(field.rows(rows), z[rows], [0.0, 1.0], told)
    assert_same(whole, rows, some)


@pytest.mark.parametrize("name", NAMES)
def test_finished_samples_leave_in_sizes_of_the_list_and_nothing_else_changes(name):
    field, z = problem()
    tolerance = 1e-3 if name == "adaptive_heun" else 1e-5
    told = Settings(atol=tolerance, rtol=tolerance)
    shrinking = get_solver(name).integrate(field, z, [0.0, 1.0], told)
    staying_field, _ = problem()
    staying_field.selects = False
    staying = get_solver(name).integrate(staying_field, z, [0.0, 1.0], told)
    assert_same(shrinking, slice(None), staying)
    assert set(staying_field.sizes) == {B}
    assert len(staying_field.sizes) == len(field.sizes) == staying.nfe.max()
    assert set(field.sizes) <= {B, 12, 8, 6, 4, 3, 2, 1}
    assert field.sizes == sorted(field.sizes, reverse=True)
    # each evaluation is of the smallest size that holds the samples under way
    for number, size in enumerate(field.sizes):
        active = int((shrinking.nfe > number).sum())
        assert size == min(B, bucket(active)), number


def test_the_sizes_of_batches():
    assert [bucket(n) for n in range(1, 18)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16, 16, 16, 16, 24]
    for number in range(1, 2000):
        assert number <= bucket(number) <= max(number, number * 1.5)
        assert bucket(bucket(number)) == bucket(number)


@pytest.mark.parametrize("selects", [True, False])
def test_a_sample_that_breaks_later_is_named_by_its_number_in_the_whole_batch(selects):
    field, z = problem()
    field.selects = selects
    last = int(get_solver("dopri5").integrate(problem()[0], z, [0.0, 1.0], Settings()).nfe.argmax())
    field.a[last] *= 40.0
    field.b[last] = 1e38  # overflows where t^2 z is large enough, long after the others are done
    with pytest.raises(RuntimeError, match=rf"ample {last} "):
        get_solver("dopri5").integrate(field, z, [0.0, 1.0], Settings())


@pytest.mark.parametrize("selects", [True, False])
def test_a_finished_sample_is_not_asked_whether_it_is_finite(selects):
    """Nor is its state touched: it rides along with others, at a time where its velocity is what it is."""
    field, z = problem()

    class Fragile(Field):
        def __call__(self, t, z):
            velocity, *rest = super().__call__(t, z)
            self.seen[self.numbers] += (t == 1.0).int()
            # a sample is evaluated at the end by the attempt that gets it there; from then on there is nothing
            return torch.where(self.seen[self.numbers, None] > 2, torch.nan, velocity), *rest

        def select(self, numbers, index):
            part = super().select(numbers, index)
            part.__class__, part.numbers, part.seen = Fragile, index, self.seen
            return part

    field.__class__, field.selects = Fragile, selects
    field.numbers, field.seen = torch.arange(B), torch.zeros(B, dtype=torch.int32)
    told = Settings(atol=1e-6, rtol=1e-6)
    solution = get_solver("tsit5").integrate(field, z, [0.0, 1.0], told)
    plain = get_solver("tsit5").integrate(problem()[0], z, [0.0, 1.0], told)
    assert (field.seen > 0).all()
    assert_same(solution, slice(None), plain)


def one_step(error, before, size, failed=False, controlled=5):
    """The next size by the formula, for one sample."""
    if error > 1:
        return size * min(1.0, max(SMALLEST, SAFETY * error ** (-1 / controlled)))
    alpha, beta = (1 - 0.75 * SHARE) / controlled, SHARE / controlled
    factor = SAFETY * max(error, 1e-10) ** -alpha * max(before, 1e-4) ** beta
    return size * min(1.0 if failed else LARGEST, max(SMALLEST, factor))


def test_the_next_size_is_that_of_the_formula():
    control = StepControl(6, 0.0, 1.0, 5, 6, None)
    control.size = np.array([0.01, 0.02, 0.01, 0.01, 0.03, 1.0])
    size, before, failed, t = control.size.copy(), np.ones(6), np.zeros(6, dtype=bool), np.zeros(6)
    for error in ([0.5, 1.5, 1e-3, 40.0, 1e-12, 0.9], [0.2, 0.7, 0.9, 0.3, 1.0, 0.1], [0.1, 2.0, 1.0001, 0.4, 0.02, 0]):
        after = control.propose()
        accept = control.judge(np.array(error), after)
        assert accept.tolist() == [e <= 1 and t_ < 1.0 for e, t_ in zip(error, t)]
        for k in range(5):
            step = size[k]
            size[k] = one_step(error[k], before[k], step, failed[k])
            failed[k] = not accept[k]
            if accept[k]:
                before[k], t[k] = error[k], t[k] + step
        t[5] = 1.0
        np.testing.assert_allclose(control.size[:5], size[:5], rtol=1e-12)
        np.testing.assert_allclose(control.t, t, rtol=1e-15)
    assert control.reached.tolist() == [False] * 5 + [True]
    assert control.accepted.tolist() == [3, 1, 2, 2, 3, 1]
    assert control.rejected.tolist() == [0, 2, 1, 1, 0, 0]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_first_size_is_that_of_the_algorithm(sign):
    """Hairer, Norsett, Wanner, II.4, by hand, with the interval's length as the longest step."""
    control = StepControl(4, 0.5, 0.5 + 0.4 * sign, 5, 6, None)
    scale, slope, change = (np.array(x) for x in ([2.0, 1e-6, 3.0, 1.0], [4.0, 1.0, 1e-7, 1e-3], [0.1, 1e-3, 0, 0]))
    control.probe(scale, slope)
    np.testing.assert_allclose(control.dt, sign * np.array([0.01 * 2 / 4, 1e-6, 1e-6, 0.4]))
    control.first_step(slope, change)
    probe = np.array([0.005, 1e-6, 1e-6, 0.4])
    steepest = np.maximum(slope, change / probe)
    np.testing.assert_allclose(control.size, np.minimum(100 * probe, (0.01 / steepest) ** 0.2))
    assert control.nfe.tolist() == [2] * 4


def test_a_step_that_would_end_close_to_the_end_goes_there():
    control = StepControl(3, 1.0, 0.0, 5, 6, None)
    control.size = np.array([0.5, 0.92, 3.0])
    assert control.propose().tolist() == [0.5, 0.0, 0.0]
    assert control.landing.tolist() == [False, True, True]
    assert math.copysign(1, control.dt[0]) == -1
    many = StepControl(1000, 1.0, 0.1, 5, 6, None)
    many.t, many.size = np.linspace(1.0, 0.11, 1000), np.ones(1000)
    assert (many.propose() == 0.1).all()
    assert (many.t + many.dt != 0.1).any()  # which a sum would miss


@pytest.mark.parametrize("pair", [embedded.DOPRI5, embedded.DOPRI8], ids=["dopri5", "dopri8"])
def test_stages_at_the_end_of_a_step_are_there_to_the_last_bit(pair):
    t = np.linspace(1.0, 0.11, 1000)
    table = Table(pair, torch.zeros(1000, 1, dtype=torch.float64))
    table.fill(t, 0.1 - t, np.full(1000, 0.1))
    assert (t + (0.1 - t) != 0.1).any()
    for moment, known in (table.t[-1], table.t_last):
        assert (moment == 0.1).all()
        assert (known == 0.1).all()
    first, _ = table.t[0]
    np.testing.assert_allclose(first, t + pair.c[1] * (0.1 - t), rtol=1e-15)


def test_an_error_without_bound_makes_the_step_as_much_smaller_as_it_gets():
    control = StepControl(1, 0.0, 1.0, 5, 6, None)
    control.size = np.array([1e-13])
    control.judge(np.array([1e30]), control.propose())
    assert control.size[0] == pytest.approx(SMALLEST * 1e-13)
    assert control.stuck() is None
    control.judge(np.array([1e30]), control.propose())
    assert control.stuck() == 0


def test_pairs_are_the_rows_of_the_table_of_methods():
    for name, pair in zip(
        NAMES, (embedded.ADAPTIVE_HEUN, embedded.BOSH3, embedded.DOPRI5, embedded.TSIT5, embedded.DOPRI8)
    ):
        solver = get_solver(name)
        assert (solver.adaptive, solver.order, solver.evaluations) == (True, pair.order, None)
