"""The executor of fixed-step methods: what a move costs, graph capture, cancellation, velocities not finite."""

import tracemalloc

import pytest
import torch
from problems import PROBLEMS, Counting
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import lfm_fast
from lfm_fast.flow.paths import Linear
from lfm_fast.solvers import METHODS, EulerMaruyama, Settings, UniPC, fixed, get_solver
from lfm_fast.solvers.grids import time_grid
from lfm_fast.solvers.schedule import Move, compile_schedule, point, velocity

FIXED = [name for name, row in METHODS.items() if row.formula is not None]
each_method = pytest.mark.parametrize("method", FIXED)


def run_of(method, field, z, num_steps, **settings):
    formula = get_solver(method).formula
    return fixed.Run(formula, field, z, time_grid(None, num_steps), Settings(path=Linear(), **settings))


def constant(z):
    """A field that makes nothing."""
    velocity = torch.full_like(z, 0.5)
    return lambda t, z: (velocity, None, None)


def test_all_methods_of_fixed_steps_are_here():
    assert FIXED == [
        "euler", "midpoint", "heun", "rk4", "ab2", "ab3", "abm5", "dpmpp_2m", "unipc", "euler_maruyama", "sde_heun"
    ]  # fmt: skip


class _Seen(TorchDispatchMode):
    """The operators that run, and an end where one reads a value back, which on a GPU waits for all before it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), "read back"
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@each_method
def test_a_move_is_one_operator_and_reads_nothing_back(method):
    """So a CUDA graph can hold the whole loop: no copies to the device in it, no waiting, the same kernels again."""
    z = torch.ones(3, 2, 5)
    run = run_of(method, constant(z), z, 6)
    with _Seen() as seen, torch.no_grad():
        run(on_step=lambda *step: None)
    evaluations = METHODS[method].evaluations(6)
    assert seen.names[:evaluations] == ["lfm_fast::guided_step"] * evaluations
    assert set(seen.names[evaluations:]) == {"aten::full"}  # the Solution's numbers, after the loop
    with _Seen(), pytest.raises(AssertionError, match="read back"):
        torch.ones(()).item()


@each_method
def test_nothing_but_states_and_kept_velocities_is_allocated(method):
    z = torch.ones(4, 3, 256)
    run = run_of(method, constant(z), z, 40)
    kept = sum(move[-1].keep_velocity is not None for move in run.moves)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    allocated = sum(event.cpu_memory_usage for event in profiler.events() if event.cpu_memory_usage > 0)
    size = z.numel() * z.element_size()
    assert allocated <= (len(run.moves) + kept) * size + 4096
    assert allocated >= len(run.moves) * size


@each_method
def test_python_allocates_no_more_for_more_steps(method):
    """tracemalloc sees what CPython takes: if any step kept as much as one object, 960 more would show."""
    z, peaks = torch.ones(2, 8), []
    for num_steps in (40, 40, 1000):
        run = run_of(method, constant(z), z, num_steps)
        with torch.no_grad():
            tracemalloc.start()
            run()
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[2] - peaks[1] < 960 * 16, peaks  # CPython hands out nothing smaller


def test_places_of_a_store_are_used_again():
    known = {"euler": 1, "rk4": 4, "ab3": 3, "abm5": 6, "dpmpp_2m": 3, "unipc": 5, "sde_heun": 3}
    for method, places in known.items():
        program = compile_schedule(get_solver(method).formula, time_grid(None, 50), Linear())
        assert program.num_places <= places, method


def test_any_point_and_velocity_so_far_may_stand_in_a_target():
    """A made-up schedule against the same sums written out."""

    class MadeUp:
        name, order = "made-up", 1

        def evaluations(self, num_steps):
            return 4

        def schedule(self, times, path):
            return [
                Move(0.9, velocity(0), arrives=False),  # no point at all
                Move(0.7, 2.0 * point(0) - point(1) + 0.5 * velocity(0), arrives=False),  # not the newest velocity
                Move(0.4, point(2) - 3.0 * (velocity(1) + velocity(0)), arrives=False),
                Move(0.1, 0.5 * (point(0) + point(3)) + velocity(3) - 0.25 * velocity(1) + 0.0 * velocity(2)),
            ]

    def field(t, z):
        return torch.sin(z + t[:, None])

    z0 = torch.tensor([[0.3, -1.2], [2.0, 0.1]], dtype=torch.float64)
    t = [torch.full((2, 1), time, dtype=torch.float64) for time in (0.9, 0.7, 0.4, 0.1)]
    v0 = torch.sin(z0 + t[0])
    z_1 = v0
    v1 = torch.sin(z_1 + t[1])
    z_2 = 2 * z0 - z_1 + 0.5 * v0
    z_3 = z_2 - 3 * (v1 + v0)
    v3 = torch.sin(z_3 + t[3])
    expected = 0.5 * (z0 + z_3) + v3 - 0.25 * v1
    solution = get_solver(MadeUp()).integrate(Counting(field), z0, [1.0, 0.0], Settings())
    torch.testing.assert_close(solution.z, expected, rtol=1e-14, atol=1e-14)
    assert solution.nfe.tolist() == [4, 4]


def test_a_schedule_is_remembered_only_where_nothing_in_it_can_change():
    class Bent(Linear.__base__):
        bend = 0.0

        def alpha(self, t):
            return 1 - t

        def sigma(self, t):
            return t + self.bend * t * (1 - t)

        def d_alpha(self, t):
            return torch.full_like(t, -1.0)

        def d_sigma(self, t):
            return 1 + self.bend * (1 - 2 * t)

    times, path = time_grid(None, 4), Bent()
    one = compile_schedule(UniPC(), times, path)
    path.bend = 0.5
    assert not torch.equal(one.weights, compile_schedule(UniPC(), times, path).weights)
    assert compile_schedule(UniPC(), times, Linear()) is compile_schedule(UniPC(), list(times), Linear())
    assert compile_schedule(UniPC(), times, Linear()) is not compile_schedule(UniPC(), times, Linear(1e-5))
    assert compile_schedule(UniPC(3), times, Linear()) is not compile_schedule(UniPC(), times, Linear())


# what is checked once only


def test_a_velocity_that_becomes_another_kind_of_tensor_is_looked_at_again():
    """Types, guidance and backends may change from move to move; a wrong shape is refused in the middle too."""
    scale, z = torch.tensor([2.0, -1.0]), torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    kinds = [
        lambda v: (v, None, None),
        lambda v: (v.bfloat16(), None, scale),  # a scale without an unconditional velocity has no effect
        lambda v: (v, v.half(), scale),
        lambda v: (v, 0.5 * v, scale),
        lambda v: (torch.nn.Parameter(v), None, None),
        lambda v: (v.T.contiguous().T, None, None),
    ]

    def plain(v, unconditional, scale):
        return v.float() if unconditional is None else scale[:, None] * v + (1 - scale[:, None]) * unconditional.float()

    times, number, expected = time_grid(None, len(kinds)), iter(kinds), z
    for kind in kinds:
        expected = expected - plain(*kind(expected)) / len(kinds)
    with torch.no_grad():
        found = get_solver("euler").integrate(lambda t, z: next(number)(z.clone()), z, times, Settings()).z
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for wrong in (lambda v: v[:1], lambda v: v.double(), lambda v: v[:, :1], lambda v: v.long(), lambda v: None):
        number = iter([lambda v: v, lambda v: v, wrong])
        with pytest.raises(ValueError, match="velocity"), torch.no_grad():
            get_solver("euler").integrate(lambda t, z, n=number: (next(n)(z), None, None), z, times, Settings())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loop_runs_on_the_backend_that_is_asked_for(dtype):
    z = PROBLEMS[1].start.to(dtype)
    results = []
    for name in ("reference", "cpp"):
        with lfm_fast.ops.use_backend(name), torch.no_grad():
            for method in ("heun", "unipc", "sde_heun"):
                settings = Settings(path=Linear())
                results.append(
                    get_solver(method).integrate(Counting(PROBLEMS[1].velocity), z, time_grid(None, 5), settings).z
                )
    for reference, compiled in zip(results[:3], results[3:]):
        torch.testing.assert_close(reference, compiled, rtol=1e-5, atol=1e-5)


# cancellation


@each_method
@pytest.mark.parametrize("trajectory", [False, True])
def test_a_callback_that_returns_false_ends_the_integration(method, trajectory):
    field, seen = Counting(PROBLEMS[1].velocity), []

    def on_step(step, t, z):
        seen.append(z)
        return None if step < 3 else step < 3 or step != 3  # exactly False at the third

    settings = Settings(path=Linear(), trajectory=trajectory, on_step=on_step)
    solution = get_solver(method).integrate(field, PROBLEMS[1].start, time_grid(None, 8), settings)
    assert len(seen) == 3
    assert torch.equal(solution.z, seen[-1])
    assert solution.time.tolist() == [0.625] * 3
    assert field.nfe == solution.nfe.unique().item() == METHODS[method].evaluations(3)
    assert solution.accepted.unique().item() == 3
    assert not solution.reached.any()
    assert solution.cancelled
    if trajectory:
        assert len(solution.states) == 4
        assert torch.equal(solution.states[-1], solution.z)


@pytest.mark.parametrize("word", [None, 0, torch.tensor(False), [], True])
def test_only_false_itself_ends_it(word):
    settings = Settings(on_step=lambda *step: word)
    assert (
        get_solver("heun")
        .integrate(constant(torch.ones(2, 3)), torch.ones(2, 3), [1.0, 0.5, 0.0], settings)
        .reached.all()
    )


def test_false_after_the_last_step_leaves_nothing_out():
    for method in ("heun", "torchdiffeq:rk4", "torchdiffeq:fehlberg2"):
        settings = Settings(on_step=lambda step, t, z: t != 0.0)
        solution = get_solver(method).integrate(Counting(PROBLEMS[0].velocity), PROBLEMS[0].start, [1.0, 0.0], settings)
        assert solution.reached.all(), method
        assert not solution.cancelled


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "method", ["heun", "ab3", "unipc", "euler_maruyama", "torchdiffeq:rk4", "torchdiffeq:fehlberg2"]
)
def test_sample_returns_what_was_reached_without_a_warning(method):
    seen = []

    def callback(step, t, z):
        seen.append((t, z))
        return step != 2

    z1 = lfm_fast.noise(3, (2, 4), seed=1)
    for trajectory in (False, True):
        seen.clear()
        z0, stats = lfm_fast.sample(
            lambda t, z: z.cos(), z1, method=method, num_steps=8, callback=callback, return_stats=True,
            trajectory=trajectory, atol=1e-7, rtol=1e-7, max_nfe=10_000 if not trajectory else None,
        )  # fmt: skip
        assert len(seen) == 2
        assert seen[-1][0] > 0.0
        assert torch.equal(z0[-1] if trajectory else z0, seen[-1][1])
        assert z0.shape == ((3, *z1.shape) if trajectory else z1.shape)
        assert stats.accepted.tolist() == [2] * 3
        assert stats.reached.tolist() == [False] * 3


# velocities that are not finite


def poisoned(bad, from_time, rows):
    def field(t, z):
        v = torch.zeros_like(z)
        if float(t[0]) <= from_time:
            v[rows, 0] = bad
        return v, None, None

    return field


@each_method
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("free", [True, False])
def test_a_velocity_that_is_not_finite_names_step_time_and_sample(method, bad, free, monkeypatch):
    monkeypatch.setattr(fixed, "_reading_is_free", lambda z: free)  # as on a GPU, where it is looked for afterwards
    # the first evaluation at 0.5 or below: by these methods at the end of step 5, by the others at the start of step 6
    step = 5 if method in ("heun", "rk4", "sde_heun") else 6
    sentence = rf"step {step} of 10, from t = {1.1 - step / 10:g} to {1 - step / 10:g}, in sample 2 and 1 more of the"
    field = poisoned(bad, 0.5, [2, 3])
    with pytest.raises(RuntimeError, match=sentence) as caught:
        get_solver(method).integrate(field, torch.zeros(5, 4), time_grid(None, 10), Settings(path=Linear()))
    assert "\n" not in str(caught.value)


def test_what_goes_wrong_once_only_is_said_all_the_same(monkeypatch):
    monkeypatch.setattr(fixed, "_reading_is_free", lambda z: False)
    calls = []

    def field(t, z):
        calls.append(t)
        return torch.full_like(z, float("nan") if len(calls) == 2 else 0.0), None, None

    with pytest.raises(RuntimeError, match=r"not finite.*a second run went well.*in sample 0 of the batch"):
        get_solver("euler").integrate(field, torch.zeros(1, 4), time_grid(None, 4), Settings())
    assert len(calls) == 8


def test_a_large_state_is_no_error():
    z = torch.full((2, 8), 3e38)  # its sum is infinite
    zero = torch.zeros_like(z)
    solution = get_solver("euler").integrate(lambda t, z: (zero, None, None), z, time_grid(None, 3), Settings())
    assert torch.equal(solution.z, z)


def test_sample_refuses_a_start_that_is_not_finite():
    z1 = torch.ones(2, 3)
    z1[1, 1] = float("nan")
    with pytest.raises(ValueError, match="z1 holds values that are not finite"):
        lfm_fast.sample(lambda t, z: z, z1, method="euler")


# objects as methods


def test_an_object_serves_as_a_method_and_an_unknown_name_is_answered_with_the_nearest():
    z1 = lfm_fast.noise(3, (2, 4), seed=1)
    by_name = lfm_fast.sample(lambda t, z: z.cos(), z1, method="unipc", num_steps=6)
    assert torch.equal(by_name, lfm_fast.sample(lambda t, z: z.cos(), z1, method=UniPC(), num_steps=6))
    assert torch.equal(by_name, lfm_fast.sample(lambda t, z: z.cos(), z1, method=METHODS["unipc"], num_steps=6))
    other = lfm_fast.sample(lambda t, z: z.cos(), z1, method=lfm_fast.solvers.UniPC(solver_order=3), num_steps=6)
    assert not torch.equal(by_name, other)
    for name, near in (
        ("uni_pc", "unipc"),
        ("Heun", "heun"),
        ("dpm++_2m", "dpmpp_2m"),
        ("eulermaruyama", "euler_maruyama"),
    ):
        with pytest.raises(ValueError, match=rf"method is '{name.replace('+', '.')}' \(nearest: {near}"):
            get_solver(name)
    for wrong in (UniPC, EulerMaruyama, 3, object(), [], None, "zzzzzz"):
        with pytest.raises(ValueError, match=r"^method is [^(]*; there are euler"):
            get_solver(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: s.UniPC(4), "solver_order is 4, expected 1, 2 or 3"),
        (lambda s: s.UniPC(True), "solver_order is True, expected 1, 2 or 3"),
        (lambda s: s.AdamsBashforth(1), "order is 1, expected 2 or 3"),
        (lambda s: s.AdamsBashforth(2.0), "order is 2.0, expected 2 or 3"),
        (lambda s: s.EulerMaruyama("linear"), "diffusion is 'linear', expected 'sigma', 'path' or a function"),
        (lambda s: s.EulerMaruyama(scale=-1.0), "scale is -1.0, expected a number of 0 or more"),
        (lambda s: s.SDEHeun(scale=float("nan")), "scale is nan"),
        (lambda s: s.SDEHeun(last_step=None), "last_step is None, expected 'ode'"),
    ],
)
def test_a_method_that_cannot_be_is_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make(lfm_fast.solvers)
