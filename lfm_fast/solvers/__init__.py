"""Solvers of dz/dt = field(t, z), behind one table.

A field is called field(t, z) with t (B,) and z (B, ...) and returns (velocity, unconditional or None, scale or None):
the velocities are NOT yet blended, because v = scale velocity + (1 - scale) unconditional happens inside the solver's
fused step; scale is (B,). A field may have a method `at(time)` that returns the field for a time known on the host,
common to all samples, so that it can decide without reading t back from the device, and a method `prepare(times)`,
called before the first evaluation with all these times in their order.

A solver steps through `times` (floats, in either direction) and returns a Solution. A new Runge-Kutta method is a
Tableau and one row here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from lfm_fast.solvers import external, fixed, tableaus
from lfm_fast.solvers.solution import Settings, Solution

__all__ = ["METHODS", "Settings", "Solution", "Solver", "get_solver"]


@dataclass(frozen=True)
class Solver:
    """A method and what the sampler has to know of it.

    integrate(field, z, times, settings) -> Solution. evaluations_per_step: None where the method decides as it goes.
    """

    name: str
    integrate: Callable[..., Solution]
    order: int | None
    adaptive: bool = False
    evaluations_per_step: int | None = None
    equidistant: bool = False  # its formula holds on equidistant times only
    stops: bool = True  # can stop at a budget of evaluations, keeping the last state


def _runge_kutta(name, tableau):
    return Solver(name, partial(fixed.integrate, tableau), tableau.order, evaluations_per_step=tableau.num_stages)


def _torchdiffeq(name, row):
    return Solver(
        name,
        partial(external.integrate, row),
        row.order,
        adaptive=row.kind in ("adaptive", "scipy"),
        evaluations_per_step=row.evaluations_per_step,
        equidistant=row.kind == "adams",
        stops=row.kind != "scipy",
    )


METHODS = {
    row.name: row
    for row in (
        _runge_kutta("euler", tableaus.EULER),
        _runge_kutta("midpoint", tableaus.MIDPOINT),
        _runge_kutta("heun", tableaus.HEUN),
        _runge_kutta("rk4", tableaus.RK4),
        *(_torchdiffeq(name, row) for name, row in external.EXTERNALS.items() if row.kind == "adaptive"),
    )
}


def get_solver(name):
    """The solver called `name`: a row of METHODS or "torchdiffeq:NAME".

    Raises ValueError, listing what there is, for any other name.

    >>> get_solver("heun").evaluations_per_step
    2
    """
    prefix, _, rest = name.partition(":") if isinstance(name, str) else ("", "", "")
    if prefix in METHODS and name == prefix:
        return METHODS[name]
    if prefix == "torchdiffeq" and rest in external.EXTERNALS:
        return _torchdiffeq(name, external.EXTERNALS[rest])
    raise ValueError(
        f"method is {name!r}; there are {', '.join(METHODS)}, and torchdiffeq:NAME with NAME one of "
        f"{', '.join(external.EXTERNALS)}."
    )
