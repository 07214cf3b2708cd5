"""Solvers of dz/dt = field(t, z), behind one table.

A field is called field(t, z) with t (B,) and z (B, ...) and returns (velocity, unconditional or None, scale or None):
the velocities are NOT yet blended, because v = scale velocity + (1 - scale) unconditional happens inside the solver's
fused step; scale is (B,). A field may have a method `at(time)` that returns the field for a time known on the host,
common to all samples, so that it can decide without reading t back from the device, and a method `prepare(times)`,
called before the first evaluation with all these times in their order; `at_each(times)` is for the times of each
sample, (B,) float64 of NumPy. Where its `selects` is true, its method
`select(numbers, index)` returns the field of some of the samples, by their numbers on the host and (R,) int64 on the
device, for a solver that lets finished ones go.

A solver steps through `times` (floats, in either direction) and returns a Solution. A new method of fixed steps is a
formula (lfm_fast.solvers.schedule) and one row here; for a Runge-Kutta method that is a Tableau, for an adaptive one a
Pair in PAIRS (lfm_fast.solvers.embedded).
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lfm_fast.solvers import adams, adaptive, embedded, external, fixed, tableaus
from lfm_fast.solvers.multistep import AdamsBashforth, AdamsBashforthMoulton, DPMSolverPP2M, UniPC
from lfm_fast.solvers.runge_kutta import HeunThenEuler, RungeKutta
from lfm_fast.solvers.solution import Settings, Solution
from lfm_fast.solvers.stochastic import EulerMaruyama, SDEHeun, Stochastic

__all__ = [
    "METHODS",
    "AdamsBashforth",
    "AdamsBashforthMoulton",
    "DPMSolverPP2M",
    "EulerMaruyama",
    "RungeKutta",
    "SDEHeun",
    "Settings",
    "Solution",
    "Solver",
    "UniPC",
    "get_solver",
]


@dataclass(frozen=True)
class Solver:
    """A method and what the sampler has to know of it.

    integrate(field, z, times, settings) -> Solution. evaluations(num_steps), None where the method decides as it goes.
    """

    name: str
    integrate: Callable[..., Solution]
    order: int | None
    adaptive: bool = False
    evaluations: Callable[[int], int] | None = None
    equidistant: bool = False  # its formula holds on equidistant times only
    stops: bool = True  # can stop at a budget of evaluations, keeping the last state
    formula: Any = None  # that of a method of fixed steps
    stochastic: bool = False  # draws noise on the way, so that finer steps do not come nearer to one result


def _fixed(formula):
    return Solver(
        formula.name,
        partial(fixed.integrate, formula),
        formula.order,
        evaluations=formula.evaluations,
        formula=formula,
        stochastic=isinstance(formula, Stochastic),
    )


def _embedded(name, pair):
    return Solver(name, partial(adaptive.integrate, pair), pair.order, adaptive=True)


def _torchdiffeq(name, row):
    return Solver(
        name,
        partial(external.integrate, row),
        row.order,
        adaptive=row.kind in ("adaptive", "scipy"),
        evaluations=row.evaluations_per_step and row.evaluations_per_step.__mul__,
        equidistant=row.kind == "adams",
        stops=row.kind != "scipy",
    )


METHODS = {
    row.name: row
    for row in (
        _fixed(RungeKutta("euler", tableaus.EULER)),
        _fixed(RungeKutta("midpoint", tableaus.MIDPOINT)),
        _fixed(RungeKutta("heun", tableaus.HEUN)),
        _fixed(RungeKutta("rk4", tableaus.RK4)),
        _fixed(AdamsBashforth(2)),
        _fixed(AdamsBashforth(3)),
        _fixed(AdamsBashforthMoulton(5)),
        _fixed(DPMSolverPP2M()),
        _fixed(UniPC()),
        _fixed(EulerMaruyama()),
        _fixed(SDEHeun()),
        Solver("adams", adams.integrate, adams.ORDER, adaptive=True),
        *(_embedded(name, pair) for name, pair in embedded.PAIRS.items()),
    )
}


# what LFM does otherwise than these methods are defined, for who needs its numbers
QUIRKS = {formula.name: _fixed(formula) for formula in (HeunThenEuler(),)}


def get_solver(method):
    """The solver of a method: a name of METHODS or QUIRKS, "torchdiffeq:NAME", a formula (lfm_fast.solvers.schedule) or
    a Solver.

    Raises ValueError, with the nearest names and all there are, for anything else.

    >>> get_solver("ab3").evaluations(50)
    52
    >>> get_solver(EulerMaruyama(diffusion="path")).name
    'euler_maruyama'
    """
    if isinstance(method, Solver):
        return method
    if hasattr(method, "schedule") and not isinstance(method, type):
        return _fixed(method)
    prefix, _, rest = method.partition(":") if isinstance(method, str) else ("", "", "")
    if prefix in METHODS and method == prefix:
        return METHODS[method]
    if prefix == "lfm" and method in QUIRKS:
        return QUIRKS[method]
    if prefix == "torchdiffeq" and rest in external.EXTERNALS:
        return _torchdiffeq(method, external.EXTERNALS[rest])
    raise ValueError(
        f"method is {method!r}{_nearest(method)}; there are {', '.join([*METHODS, *QUIRKS])}, and torchdiffeq:NAME "
        f"with NAME one of {', '.join(external.EXTERNALS)}."
    )


def _nearest(method):
    names = [*METHODS, *QUIRKS, *(f"torchdiffeq:{name}" for name in external.EXTERNALS)]
    near = difflib.get_close_matches(method.lower(), names) if isinstance(method, str) else []
    return f" (nearest: {', '.join(near)})" if near else ""
