"""Times fitted to a model: the N steps of a method that lead closest to a fine solution."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from lfm_fast import __version__
from lfm_fast.checkpoint import atomic_write
from lfm_fast.flow.noise import noise
from lfm_fast.flow.paths import describe
from lfm_fast.sampling import choose_path, sample
from lfm_fast.solvers import get_solver
from lfm_fast.solvers.grids import time_grid

_STARTS = (None, ("shift", 0.5), ("shift", 2.0), ("shift", 4.0), "logit")  # the best of them is where the fit begins
_NUDGE = 0.05  # of the logarithm of a step, for the differences that stand for derivatives
_LARGEST_MOVE = 1.0  # of the same, in one round
_LEAST_ERROR = 1e-12  # of one sample; none counts for more than that
_TRIALS = 4  # of a shorter and shorter move, in one round
_OF_THE_FIT = ("time_grid", "t_start", "t_end", "trajectory", "return_stats", "callback", "progress", "seed", "indices")


@dataclass(frozen=True)
class TunedGrid:
    """Times for `time_grid=`, and what they were fitted to.

    times: N + 1 floats. fitted, held_out: errors on the noise of the fit and on other noise, each {"seed", "samples",
    "uniform": error, "tuned": error} with an error's mean, median and 90th percentile over the samples. settings: the
    method, num_steps and sampling arguments. fine: the solution it was fitted to, and how far half as many steps are
    from it.
    """

    times: list[float]
    fitted: dict
    held_out: dict
    settings: dict = field(default_factory=dict)
    fine: dict = field(default_factory=dict)

    def save(self, file, **more):
        """Write all of it, and `more` (the model's name, say), as a .json file that `time_grid=` takes."""
        content = {**asdict(self), **more, "lfm_fast": __version__}
        with atomic_write(Path(file)) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def __str__(self):
        lines = ["times " + ", ".join(f"{t:.4f}" for t in self.times)]
        for words, found in (("noise of the fit", self.fitted), ("held-out noise", self.held_out)):
            parts = (f"{key} {found['uniform'][key]:.2e} -> {found['tuned'][key]:.2e}" for key in found["uniform"])
            lines.append(f"error, uniform -> tuned, {found['samples']} samples of {words}: {', '.join(parts)}")
        return "\n".join(lines)


def tune_grid(
    model,
    shape,
    *,
    method="heun",
    num_steps=10,
    labels=None,
    num_samples=24,
    num_held_out=48,
    seed=0,
    rounds=3,
    fine_steps=24,
    path=None,
    device=None,
    on_round=None,
    **sampling,
):
    """Fit the N + 1 times of a fixed-step method to a model: for `time_grid=` of `sample`.

        minimise over t_1 > ... > t_(N-1)   sum_i log e_i,    e_i = ||z_i(times) - z_i*|| / ||z_i*||

    z_i(times) is `sample`'s result from noise i, z_i* that of `fine_steps` RK4 steps. The geometric mean of the errors:
    their squares are mostly those of a few samples that lie between two pictures, and what is fitted to them is worse
    on others. Gauss-Newton steps (Levenberg, Marquardt) in the logarithms of the step lengths, with differences for
    derivatives: nothing is asked of the model but to be called. A round costs about N + 1 solves of `num_samples`.

    Args:
        model: as `sample` takes it.
        shape: of one latent, (C, h, w).
        method, num_steps: of the table; any fixed-step method that is deterministic.
        labels: None, or labels that the samples take in turn.
        num_samples, num_held_out: samples to fit, of `seed`; samples only to measure on, of seed + 1.
        rounds: Gauss-Newton steps at most; 0 only chooses among a few grids that have names.
        path: of the model; None takes what the model says, or Linear().
        device: where the noise is made; None is the CPU.
        on_round: called as on_round(number, mean error) after each round.
        sampling: further arguments of `sample` (guidance_scale, null_label, model_kwargs, ...).

    Returns: a TunedGrid.

    Raises ValueError for a method whose steps are not fixed, and for whatever `sample` refuses.

    >>> def model(t, z, y=None):
    ...     return -3 * (2 * z).sin() * (1 - t)[:, None] ** 2  # little happens near noise, much near data
    >>> grid = lfm_fast.tune_grid(model, (4,), method="heun", num_steps=4, num_samples=4, num_held_out=8)
    >>> grid.held_out["tuned"]["mean"] < grid.held_out["uniform"]["mean"] / 5
    True

    Source: Hairer and Wanner, "Solving Ordinary Differential Equations II", IV.8 for the damping; fitted times as such:
    Sabour et al., arXiv 2404.14507, which bounds an error where this measures it.
    """
    path = choose_path(model, path)
    _check(method, num_steps, num_samples, num_held_out, rounds, fine_steps, sampling)
    sampling |= {"path": path}
    known = {"shape": shape, "labels": labels, "device": device}
    fit = _Problem(model, method, num_samples, seed, fine_steps, known, sampling)
    held_out = _Problem(model, method, num_held_out, seed + 1, fine_steps, known, sampling)
    starts = [torch.tensor(time_grid(kind, num_steps, path=path), dtype=torch.float64) for kind in _STARTS]
    times = min(starts, key=lambda times: _objective(fit.residual(times)))
    times = _fit(fit, times, rounds, on_round).tolist()
    uniform = time_grid(None, num_steps, path=path)
    return TunedGrid(
        times,
        *(problem.summary(uniform=uniform, tuned=times) for problem in (fit, held_out)),
        settings=_described(method, num_steps, labels, path, sampling),
        fine={"method": "rk4", "num_steps": fine_steps, "half_as_many_differ_by": fit.uncertainty()},
    )


class _Problem:
    """Samples and their fine solution."""

    def __init__(self, model, method, count, seed, fine_steps, known, sampling):
        self.model, self.method, self.seed, self.fine_steps, self.sampling = model, method, seed, fine_steps, sampling
        self.z_1 = sampling["path"].prior(noise(count, known["shape"], seed=seed, device=known["device"]))
        self.y = None
        if known["labels"] is not None:
            labels = torch.as_tensor(known["labels"])
            self.y = labels[torch.arange(count) % len(labels)].to(self.z_1.device)
        self.solution = self._solve(method="rk4", num_steps=fine_steps)
        norm = self.solution.double().flatten(1).norm(dim=1, keepdim=True)
        self.norm = norm.clamp_min(torch.finfo(torch.float32).tiny)

    def _solve(self, **chosen):
        return sample(self.model, self.z_1, y=self.y, **chosen, **self.sampling)

    def residual(self, times):
        """(B, numel) float64: each sample's distance from its solution, over that one's length."""
        return self._relative(self._solve(method=self.method, time_grid=times))

    def _relative(self, z_0):
        return (z_0.double() - self.solution.double()).flatten(1) / self.norm

    def summary(self, **grids):
        errors = {name: _spread(self.residual(times).norm(dim=1)) for name, times in grids.items()}
        return {"seed": self.seed, "samples": len(self.z_1), **errors}

    def uncertainty(self):
        return _spread(self._relative(self._solve(method="rk4", num_steps=max(1, self.fine_steps // 2))).norm(dim=1))


def _spread(errors):
    return {"mean": float(errors.mean()), "median": float(errors.median()), "p90": float(errors.quantile(0.9))}


def _fit(problem, start, rounds, on_round):
    """Levenberg-Marquardt from the times `start` (N + 1,); the best times found."""
    unknowns, times, damping = start.diff().abs().log(), start, 1e-2
    residual = problem.residual(times)
    for number in range(1, rounds + 1):
        normal, gradient = _derivatives(problem, unknowns, start, residual)
        for _ in range(_TRIALS):
            scale = normal.diagonal() + 1e-12 * normal.diagonal().max() + torch.finfo(torch.float64).tiny
            move = -torch.linalg.solve(normal + damping * scale.diag(), gradient)
            trial = unknowns + move.clamp(-_LARGEST_MOVE, _LARGEST_MOVE)
            found = problem.residual(_times(trial, start))
            if _objective(found) < _objective(residual):
                break
            damping *= 5
        else:
            return times  # a minimum, as far as the differences tell
        unknowns, times, residual, damping = trial, _times(trial, start), found, damping / 5
        if on_round is not None:
            on_round(number, float(residual.norm(dim=1).mean()))
    return times


def _objective(residual):
    """sum_i log e_i."""
    return float(residual.norm(dim=1).clamp_min(_LEAST_ERROR).log().sum())


def _derivatives(problem, unknowns, start, residual):
    """Its J^T J (N, N) and J^T r (N,): J has the residual's differences by the unknowns, all over each sample's e_i."""
    nudges = _NUDGE * torch.eye(len(unknowns), dtype=torch.float64)
    error = residual.norm(dim=1, keepdim=True).clamp_min(_LEAST_ERROR)
    columns = [(problem.residual(_times(unknowns + nudge, start)) - residual) / error for nudge in nudges]
    jacobian = torch.stack([column.flatten() for column in columns], dim=1) / _NUDGE
    return (jacobian.T @ jacobian).cpu(), (jacobian.T @ (residual / error).flatten()).cpu()


def _times(unknowns, start):
    """The times between the ends of `start` whose steps are as exp(unknowns)."""
    inner = unknowns.softmax(0).cumsum(0)[:-1]
    return torch.cat([start[:1], start[0] + (start[-1] - start[0]) * inner, start[-1:]])


def _check(method, num_steps, num_samples, num_held_out, rounds, fine_steps, sampling):
    solver = get_solver(method)
    if solver.adaptive:
        raise ValueError(f"{solver.name} chooses its own steps; tune_grid is for fixed-step methods.")
    if solver.stochastic:
        raise ValueError(f"{solver.name} draws noise of its own; tune_grid is for methods that follow the flow.")
    if solver.equidistant:
        raise ValueError(f"{solver.name} needs equidistant times, so there are none to tune.")
    counts = {"num_samples": num_samples, "num_held_out": num_held_out, "rounds": rounds, "fine_steps": fine_steps}
    for name, value in ({"num_steps": num_steps} | counts).items():
        least = {"num_steps": 2, "rounds": 0}.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} is {value!r}, expected a whole number from {least} on.")
    for name in sampling:
        if name in _OF_THE_FIT:
            raise ValueError(f"{name} is not for tune_grid, which integrates seeds of its own from noise to data.")


def _described(method, num_steps, labels, path, sampling):
    """What a file can say of the settings: numbers and words as they are, of anything else its type."""
    plain = {name: value for name, value in sampling.items() if name not in ("path", "model_kwargs")}
    plain = {
        k: v if isinstance(v, (int, float, str, tuple, type(None))) else type(v).__name__ for k, v in plain.items()
    }
    labels = None if labels is None else torch.as_tensor(labels).tolist()
    try:
        named = describe(path)
    except ValueError:  # a path of the user's own
        named = {"name": type(path).__name__}
    return {"method": get_solver(method).name, "num_steps": num_steps, "labels": labels, "path": named, **plain}
