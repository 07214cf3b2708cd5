"""A method of fixed steps as data: the moves it makes, each one evaluation and the point that follows from it.

Move i evaluates the field at point i, the first being point 0, and makes point i + 1:

    velocity_i   = field(time_i, point_i)
    point_(i+1)  = sum_j a_j point_j + sum_j b_j velocity_j + noise normal(draw),        j <= i

All that these methods do is linear in points and velocities, so a, b and noise, made in float64 on the host before
anything is evaluated, are all that a method has to say. One that says it is a formula, an object with

    name, order, schedule(times, path) -> list of Move, evaluations(num_steps) -> int

`path` gives alpha, sigma and their derivatives to those that need them.
"""

from dataclasses import dataclass, is_dataclass
from functools import lru_cache
from typing import NamedTuple

import torch


class Combination:
    """A weighted sum of points and velocities, to be written as it stands in a paper.

    >>> (point(0) - 0.5 * (velocity(0) + velocity(1))).weights
    {('point', 0): 1.0, ('velocity', 0): -0.5, ('velocity', 1): -0.5}
    """

    __slots__ = ("weights",)

    def __init__(self, weights):
        self.weights = weights

    def __add__(self, other):
        weights = self.weights.copy()
        for name, weight in other.weights.items():
            weights[name] = weights.get(name, 0.0) + weight
        return Combination(weights)

    def __rmul__(self, factor):
        return Combination({name: factor * weight for name, weight in self.weights.items()})

    def __sub__(self, other):
        return self + -1.0 * other


def point(j):
    """Point j; 0 is the state at the first time."""
    return Combination({("point", j): 1.0})


def velocity(j):
    """The velocity of move j, after guidance."""
    return Combination({("velocity", j): 1.0})


@dataclass(frozen=True)
class Move:
    """Evaluate at the newest point, at `time`; the next point is `target`.

    arrives: it is the state at the next time of the grid, and not a stage on the way. noise: the factor of a standard
    normal, that of number `draw` of each sample.
    """

    time: float
    target: Combination
    arrives: bool = True
    noise: float = 0.0
    draw: int = 0


class Instruction(NamedTuple):
    """What a move reads and keeps: points and velocities by their places in a store."""

    base: int  # guided_step's z
    stored: list[int]
    noisy: bool
    draw: int
    keep_velocity: int | None  # where it goes, None where no later move reads it
    keep_point: int | None
    arrives: bool


@dataclass(frozen=True)
class Program:
    """A schedule as the executor runs it, for any state; its numbers are float64 on the host."""

    instructions: list[Instruction]
    num_places: int  # in the store; point 0 goes to place 0
    moments: list[float]  # of the evaluations
    weights: torch.Tensor  # guided_step's, of all moves one after the other,
    sizes: list[int]  # so many for each
    noise: torch.Tensor | None

    def numbers(self, z):
        """What each move needs for states like z (B, ...), moved to its device at once: t (B,), weights (B, 2 + K) and
        the factor of noise (B,) or None."""
        batch_size = z.shape[0]
        times = torch.tensor(self.moments, dtype=torch.float64).to(z).repeat_interleave(batch_size).split(batch_size)
        weights = self.weights.to(z).expand(batch_size, -1).split(self.sizes, dim=1)
        if self.noise is None:
            return times, weights, [None] * len(self.moments)
        noise = self.noise.to(z)[:, None].expand(-1, batch_size).unbind(0)
        return times, weights, [own if move.noisy else None for own, move in zip(noise, self.instructions)]


_LONGEST_KEPT = 1000


def compile_schedule(formula, times, path):
    """The Program of a formula on a grid. Those of frozen dataclasses, which cannot change, are remembered."""
    fixed = len(times) <= _LONGEST_KEPT and _frozen(formula) and _frozen(path)
    return (_remembered if fixed else _compile)(formula, tuple(times), path)


def _frozen(value):
    try:
        hash(value)  # a list inside has none
    except TypeError:
        return False
    return is_dataclass(value) and value.__dataclass_params__.frozen


def _compile(formula, times, path):
    moves = formula.schedule(list(times), path)
    terms = [_terms(i, move.target.weights) for i, move in enumerate(moves)]
    places, count = _places(terms)
    instructions = [
        Instruction(
            base=places[base],
            stored=[places[name] for name in others],
            noisy=move.noise != 0.0,
            draw=move.draw,
            keep_velocity=places.get(("velocity", i)),
            keep_point=places.get(("point", i + 1)),
            arrives=move.arrives,
        )
        for i, (move, (base, _, *others)) in enumerate(zip(moves, terms))
    ]
    weights = [move.target.weights.get(name, 0.0) for move, names in zip(moves, terms) for name in names]
    noise = [move.noise for move in moves]
    return Program(
        instructions,
        count,
        [move.time for move in moves],
        torch.tensor(weights, dtype=torch.float64),
        [len(names) for names in terms],
        torch.tensor(noise, dtype=torch.float64) if any(noise) else None,
    )


_remembered = lru_cache(maxsize=16)(_compile)


def _terms(i, weights):
    """What move i sums, in guided_step's order: a point, the new velocity, then all others."""
    new, names = ("velocity", i), sorted([name for name, weight in weights.items() if weight != 0.0])
    base = names[0] if names and names[0][0] == "point" else ("point", i)
    return [base, new, *[name for name in names if name not in (base, new)]]


def _places(terms):
    """A place for every point and velocity that a later move reads, free for others after the last one that does."""
    last = {name: i for i, names in enumerate(terms) for name in names if name != ("velocity", i)}
    retired = [[] for _ in terms]
    for name, i in last.items():
        retired[i].append(name)
    places, free, count = {("point", 0): 0}, [], 1
    for i, names in enumerate(retired):
        free += [places[name] for name in names]  # a move has read before it writes
        for name in (("velocity", i), ("point", i + 1)):
            if name in last:
                if not free:
                    free, count = [count], count + 1
                places[name] = free.pop()
    return places, count
