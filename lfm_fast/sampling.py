"""Sampling: integrate a model's velocity from noise to latents."""

import sys
import time
import warnings
from dataclasses import dataclass
from itertools import pairwise

import torch

from lfm_fast.flow.checks import FLOATS, check_labels, check_model, describe
from lfm_fast.flow.noise import check_indices, check_seed
from lfm_fast.flow.paths import Linear, Path, path_of
from lfm_fast.guidance import GuidedField, LinearGuidance, Network, Run
from lfm_fast.solvers import Settings, get_solver
from lfm_fast.solvers.external import EXTERNALS
from lfm_fast.solvers.grids import is_number
from lfm_fast.solvers.grids import time_grid as make_grid


@dataclass(frozen=True)
class SampleStats:
    """What a call of `sample` cost, sample by sample; all tensors (B,) on the CPU.

    nfe counts evaluations of the velocity field by the solver until the sample was finished; forwards the rows that the
    network computed for it (guidance makes two rows of one evaluation, and a finished sample has some more where it
    rode along with others); calls the calls of the model. accepted and rejected count steps (0 for scipy_solver, which
    does not tell). reached is False where max_nfe or the callback ended the integration before t_end. seconds is
    wall-clock time.
    """

    nfe: torch.Tensor
    forwards: torch.Tensor
    calls: int
    accepted: torch.Tensor
    rejected: torch.Tensor
    reached: torch.Tensor
    seconds: float


def sample(
    model,
    z1,
    *,
    y=None,
    guidance_scale=1.0,
    null_label=None,
    guidance_interval=(0.0, 1.0),
    method="dopri5",
    num_steps=50,
    time_grid=None,
    atol=1e-5,
    rtol=1e-5,
    max_nfe=None,
    t_start=1.0,
    t_end=0.0,
    path=None,
    guidance=None,
    seed=0,
    indices=None,
    compat=None,
    model_kwargs=None,
    trajectory=False,
    return_stats=False,
    callback=None,
    progress=False,
):
    """Integrate dz/dt = v(t, z) from the state z1 at t_start to t_end; t = 1 is noise, t = 0 is data.

        v = guidance_scale model(t, z, y) + (1 - guidance_scale) model(t, z, null label)

    Any module or callable model(t, z, y=None, **model_kwargs) with t (B,) that returns a velocity of the shape of z
    serves as it is. Its mode is not changed: call model.eval() yourself. Runs under torch.no_grad().

    Args:
        model: the velocity. y is passed by name, and left out when it is None and there is no guidance. A DiT runs
            in its sampling form (DiT.prepare) where a fixed method makes all times known: the same up to rounding.
        z1: (B, ...) state at t_start; at t = 1 the noise (path.prior of it for VarianceExploding). Inside it is at
            least float32.
        y: (B,) integer labels.
        guidance_scale: number, (B,), function of t or table ((t, scale), ...); 1 is conditional and costs one forward
            per evaluation.
        null_label: the label that means "no label"; with it both velocities come from one forward of 2 B rows.
            Without it the unconditional velocity is model(t, z, y=None), a forward of its own.
        guidance_interval: (low, high) in t; outside it the unconditional forward is skipped.
        method: euler, midpoint, heun, rk4 (fixed); ab2, ab3, abm5, dpmpp_2m, unipc (fixed, one evaluation a step);
            euler_maruyama, sde_heun (fixed, stochastic); adams, dopri5, dopri8, bosh3, adaptive_heun, tsit5 (adaptive,
            each sample with its own steps, so that it does not depend on which others are in the batch); any of
            torchdiffeq's as "torchdiffeq:NAME" (its adaptive ones have one step size for the whole batch); or an object
            such as lfm_fast.solvers.UniPC(solver_order=3) or EulerMaruyama(diffusion="path").
        num_steps: solver steps N of a fixed method; of an adaptive one only the N + 1 times of a trajectory.
        time_grid: None or "uniform"; "lfm" (N points over [1, 1e-5], so N - 1 steps); ("shift", s), that is
            t' = s t / (1 + (s - 1) t); "quadratic"; "logit" or ("logit", a), even in log((t + a) / (1 - t + a));
            "karras" or ("karras", rho), even in (sigma / alpha)^(1 / rho); ("step", h), a 1-D tensor of strictly
            monotone times, or a .json file of them (as `tune_grid` writes it), instead of num_steps.
        atol, rtol: tolerances of adaptive methods.
        max_nfe: evaluations at most, of each sample. A fixed method that needs more is refused. An adaptive one stops
            where it is, warns, returns the state of its last accepted step and says reached = False in the stats.
        t_start, t_end: in [0, 1], in either order. Moved inside [path.t_min, path.t_max].
        path: the path the model was trained on; None takes what the model says (`path` of the adapters of
            lfm_fast.interop), or Linear().
        guidance: an object of lfm_fast.guidance instead of guidance_scale and guidance_interval: LinearGuidance,
            Rescale, APG, CFGZeroStar, Autoguidance, ClassifierGuidance, or your own of their protocol.
        seed, indices: the noise of stochastic methods, that of sample number indices[i] (None being i) of the seed.
        compat: "lfm" integrates as LFM does: grid "lfm" for fixed methods, and the adaptive ones that torchdiffeq has
            are torchdiffeq's, which step past t_end. Its Heun, which goes on as Euler after 39 steps, is
            method="lfm:heun40".
        model_kwargs: further keyword arguments of the model, which is then called on the whole batch only, unless they
            are among its `sample_arguments`: the names of those that hold one entry per sample.
        trajectory: return (K, B, ...) states at every time of the grid, both ends included, instead of the last.
        return_stats: return (z0, SampleStats).
        callback: called as callback(step, t, z) after each accepted step, step counting from 1, z being the state at
            t; of an adaptive method of ours after each round of attempts, with t (B,) the time of each sample. Where it
            returns exactly False, the integration ends there, with reached = False in the stats. z is the solver's own
            state: clone what is kept or changed.
        progress: show a progress bar (tqdm).

    Returns: (B, ...) latents on the device of z1, float32 (float64 for a float64 z1).

    Raises:
        ValueError: any argument that cannot be used, before the model is called; a result of the model that is no
            velocity of the shape of z.
        RuntimeError: a velocity is not finite (the sentence names sample and time); steps get too small.

    >>> import torch, lfm_fast
    >>> z1 = lfm_fast.noise(4, (4, 8, 8), seed=0)
    >>> z0, stats = lfm_fast.sample(lambda t, z: z, z1, method="heun", num_steps=25, return_stats=True)
    >>> int(stats.nfe[0]), bool(torch.allclose(z0, z1 / torch.e, atol=1e-3))
    (50, True)

    Source: Dao et al., arXiv 2307.08698, section 3; Lipman et al., arXiv 2210.02747.
    """
    check_tensors(model, z1, y, indices, model_kwargs, callback)
    check_numbers(num_steps, atol, rtol, max_nfe, seed, compat)
    if null_label is not None:
        check_null_label(null_label, torch.int64 if y is None else y.dtype)
    guidance = choose_guidance(guidance, guidance_scale, guidance_interval)
    solver, path, times = planned(model, method, num_steps, time_grid, t_start, t_end, path, compat)
    if hasattr(guidance, "begin"):
        guidance = guidance.begin(guided_run(solver, model, z1, y, null_label, path))
    grid, times = times, after_zero_steps(guidance, times)
    _check_budget(solver, max_nfe, len(times) - 1, trajectory)

    started = time.perf_counter()
    with torch.no_grad(), _Progress(progress, None if solver.adaptive else len(times) - 1, callback) as watch:
        z = z1.detach().to(torch.promote_types(z1.dtype, torch.float32), copy=True)  # never z1's own memory
        network = Network(model, z, y, null_label, model_kwargs)
        field = GuidedField(network, guidance)
        settings = Settings(
            atol=atol,
            rtol=rtol,
            max_nfe=max_nfe,
            trajectory=trajectory,
            on_step=field.watching(watch.on_step),
            inside=compat != "lfm",
            path=path,
            seed=seed,
            index=indices,
        )
        solution = solver.integrate(field, z, times, settings)
        left_out = [z] * (len(grid) - len(times))
        result = torch.stack(left_out + solution.states) if trajectory else solution.z
    if not solution.cancelled and not bool(solution.reached.all()):
        _warn_of_budget(method, max_nfe, solution, times[-1])
    return (result, _stats(solution, field, z.device, started)) if return_stats else result


def guided_run(solver, model, z1, y, null_label, path):
    """What a guidance object may ask."""
    return Run(
        model=model,
        batch_size=z1.shape[0],
        y=y,
        null_label=null_label,
        path=path,
        method=solver.name,
        adaptive=solver.adaptive,
    )


def after_zero_steps(guidance, times):
    """The times that are left when the state stays as it is in the guidance's `zero_steps`."""
    count, num_steps = getattr(guidance, "zero_steps", 0), len(times) - 1
    if count >= num_steps:
        raise ValueError(f"guidance leaves out the first {count} of {num_steps} steps (zero_steps): none is left.")
    return times[count:]


def planned(model, method, num_steps, time_grid, t_start, t_end, path, compat):
    """(solver, path, times), which no batch decides. Raises ValueError for what makes none."""
    solver = get_solver(_of_torchdiffeq(method) if compat == "lfm" else method)
    path = choose_path(model, path)
    return solver, path, _times(solver, time_grid, num_steps, t_start, t_end, path, compat)


def _of_torchdiffeq(method):
    """An adaptive method's name where torchdiffeq has it: the one that LFM runs, with one step size for the batch."""
    theirs = EXTERNALS.get(method) if isinstance(method, str) else None
    return method if theirs is None or theirs.kind != "adaptive" else f"torchdiffeq:{method}"


def _warn_of_budget(method, max_nfe, solution, t_end):
    late = solution.time[~solution.reached]
    warnings.warn(
        f"{method} used its max_nfe = {max_nfe} evaluations before t = {t_end:g}: {len(late)} of {len(solution.time)} "
        f"samples are returned as they are at t = {late.min():g} to {late.max():g}; reached in the stats tells which.",
        stacklevel=3,
    )


def _stats(solution, field, device, started):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)  # else the clock stops before the device does
    return SampleStats(
        nfe=solution.nfe,
        forwards=field.network.forwards,
        calls=field.network.calls,
        accepted=solution.accepted,
        rejected=solution.rejected,
        reached=solution.reached,
        seconds=time.perf_counter() - started,
    )


class _Progress:
    """The callback and the progress bar, as the one function a solver calls after a step; None without both."""

    def __init__(self, wanted, total, callback):
        self.wanted, self.total, self.callback, self.bar = wanted, total, callback, None
        self.on_step = self._step if wanted or callback is not None else None

    def __enter__(self):
        if self.wanted:
            from tqdm import tqdm

            self.bar = tqdm(total=self.total, desc="sampling", unit="step")
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()

    def _step(self, step, t, z):
        if self.bar is not None:
            self.bar.update()
        return None if self.callback is None else self.callback(step, t, z)


def choose_path(model, path):
    """The path to sample the model on: `path`, or what the model says, or Linear(). ValueError where the two differ."""
    if path is not None and not isinstance(path, Path):
        raise ValueError(f"path is {path!r}, expected an object of lfm_fast.paths such as Linear().")
    own = path_of(model)
    if own is None:
        return Linear() if path is None else path
    if path not in (None, own):
        raise ValueError(f"path is {path!r}, but the model says it was trained on {own!r}; leave path out.")
    return own


def _times(solver, time_grid, num_steps, t_start, t_end, path, compat):
    for name, value in (("t_start", t_start), ("t_end", t_end)):
        if not is_number(value) or not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value!r}, expected a number in [0, 1] (0 is data, 1 is noise).")
    if time_grid is None and compat == "lfm" and not solver.adaptive:
        time_grid = "lfm"
    times = make_grid(time_grid, num_steps, t_start, t_end, path)
    steps = [after - before for before, after in pairwise(times)]
    if solver.equidistant and max(steps) - min(steps) > 1e-6 * abs(steps[0]):
        raise ValueError(f"{solver.name} is a multistep formula for equidistant times; give time_grid='uniform'.")
    return times


def choose_guidance(guidance, scale, interval):
    if guidance is None:
        return LinearGuidance(scale, interval)
    if not callable(guidance):
        raise ValueError(f"guidance is {guidance!r}, expected an object called as guidance(network, t, z, time=None).")
    if LinearGuidance(scale, interval).guided:
        raise ValueError("Both guidance and guidance_scale were given; give one of them.")
    if tuple(interval) != (0.0, 1.0):
        raise ValueError("Both guidance and guidance_interval were given, which is of guidance_scale; give one.")
    return guidance


def check_null_label(null_label, dtype):
    if not isinstance(null_label, int) or isinstance(null_label, bool) or null_label < 0:
        raise ValueError(f"null_label is {null_label!r}, expected a label (an integer from 0 on) or None.")
    if null_label > torch.iinfo(dtype).max:
        raise ValueError(f"null_label is {null_label}, more than {dtype} holds, which is the type of the labels y.")


def check_tensors(model, z1, y, indices, model_kwargs, callback):
    check_model(model, model_kwargs)
    if not isinstance(z1, torch.Tensor) or z1.dtype not in FLOATS or z1.ndim < 2 or z1.numel() == 0:
        raise ValueError(
            f"z1 is {describe(z1)}, expected a (B, ...) tensor with at least one sample in float32, float64, float16 "
            "or bfloat16, as lfm_fast.noise makes."
        )
    if z1.device.type == "cpu" and not bool(z1.isfinite().all()):  # elsewhere it would have to be waited for
        raise ValueError("z1 holds values that are not finite, expected a state to start from.")
    if y is not None:
        check_labels(y, z1.shape[0])
        if y.device != z1.device:
            raise ValueError(f"y is on {y.device} and z1 on {z1.device}; move them to one device.")
    if indices is not None:
        check_indices(indices, z1.shape[0])
    for name in set(model_kwargs or {}) & set(getattr(model, "sample_arguments", ())):
        x = model_kwargs[name]
        if x is not None and not (isinstance(x, torch.Tensor) and x.ndim and len(x) == len(z1)):
            raise ValueError(
                f"{name} in model_kwargs is {describe(x)}, expected a tensor "
                f"with one entry for each of {len(z1)} samples."
            )
    if callback is not None and not callable(callback):
        raise ValueError(f"callback is {callback!r}, expected a function callback(step, t, z).")


def check_numbers(num_steps, atol, rtol, max_nfe, seed, compat):
    for name, value in (("num_steps", num_steps), ("max_nfe", max_nfe)):
        if (name, value) != ("max_nfe", None) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} is {value!r}, expected a whole number from 1 on.")
    for name, value in (("atol", atol), ("rtol", rtol)):
        if not is_number(value) or not 0.0 <= value <= sys.float_info.max:
            raise ValueError(f"{name} is {value!r}, expected a tolerance of 0 or more.")
    if atol == rtol == 0:
        raise ValueError("atol and rtol are both 0, which no step can meet; give at least one of them.")
    check_seed(seed)
    if compat is not None and not (isinstance(compat, str) and compat == "lfm"):
        raise ValueError(f"compat is {compat!r}, expected None or 'lfm'.")


def _check_budget(solver, max_nfe, num_steps, trajectory):
    if max_nfe is None:
        return
    if solver.evaluations is not None:
        cost = solver.evaluations(num_steps)
        if cost > max_nfe:
            raise ValueError(
                f"{solver.name} with {num_steps} steps makes {cost} evaluations, max_nfe is {max_nfe}: take fewer."
            )
    elif not solver.stops:
        raise ValueError(f"{solver.name} cannot be stopped at max_nfe; leave max_nfe out or choose another method.")
    elif trajectory:
        raise ValueError(f"{solver.name} cannot return a trajectory cut short by max_nfe; leave one of the two out.")
