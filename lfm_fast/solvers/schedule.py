"""A method of fixed steps as data: the moves it makes, each one evaluation and the point that follows from it.

Move i evaluates the field at point i, the first being point 0, and makes point i + 1:

    velocity_i   = field(time_i, point_i)
    point_(i+1)  = sum_j a_j point_j + sum_j b_j velocity_j + noise normal(draw),        j <= i

All that these methods do is linear in points and velocities, so a, b and noise, made in float64 on the host before
anything is evaluated, are all that a method has to say. One that says it is a formula, an object with

    name, order, schedule(times, path) -> list of Move, evaluations(num_steps) -> int

`path` gives alpha, sigma and their derivatives to those that need them.
"""

from dataclasses import dataclass
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
        names = {**self.weights, **other.weights}
        return Combination({name: self.weights.get(name, 0.0) + other.weights.get(name, 0.0) for name in names})

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
    """A move with its numbers on the device, and points and velocities by their places in a store."""

    t: torch.Tensor  # (B,)
    base: int  # guided_step's z
    stored: list[int]
    weights: torch.Tensor  # (B, 2 + K)
    noise_scale: torch.Tensor | None  # (B,)
    offset: int  # of the noise, in blocks of the counter
    keep_velocity: int | None  # where it goes, None where no later move reads it
    keep_point: int | None
    arrives: bool


def compile_moves(moves, z):
    """(instructions, number of places) of a schedule for states like z (B, ...); point 0 goes to place 0."""
    terms = [_terms(i, move.target) for i, move in enumerate(moves)]
    places = _places(terms)
    times = _moved([move.time for move in moves], z)[:, None].repeat(1, z.shape[0]).unbind(0)
    rows = [[move.target.weights.get(name, 0.0) for name in names] for move, names in zip(moves, terms)]
    weights = _moved([number for row in rows for number in row], z).split([len(row) for row in rows])
    noise = _moved([move.noise for move in moves], z).split(1)
    blocks = (z[0].numel() + 3) // 4
    instructions = [
        Instruction(
            t=times[i],
            base=places[names[0]],
            stored=[places[name] for name in names[2:]],
            weights=weights[i].expand(z.shape[0], -1),
            noise_scale=noise[i].expand(z.shape[0]) if move.noise else None,
            offset=move.draw * blocks,
            keep_velocity=places.get(("velocity", i)),
            keep_point=places.get(("point", i + 1)),
            arrives=move.arrives,
        )
        for i, (move, names) in enumerate(zip(moves, terms))
    ]
    return instructions, 1 + max(places.values())


def _terms(i, target):
    """What move i sums, in guided_step's order: a point, the new velocity, then all others."""
    new, names = ("velocity", i), sorted(name for name, weight in target.weights.items() if weight != 0.0)
    base = next((name for name in names if name[0] == "point"), ("point", i))
    return [base, new, *(name for name in names if name not in (base, new))]


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
    return places


def _moved(numbers, z):
    return torch.tensor(numbers, dtype=torch.float64).to(z)
