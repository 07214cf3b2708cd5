"""Methods that use velocities of earlier steps: one evaluation a step. Weights are for uneven grids as well."""

import math
from dataclasses import dataclass
from itertools import pairwise

from lfm_fast.solvers.marginals import Marginal, marginals
from lfm_fast.solvers.runge_kutta import RungeKutta
from lfm_fast.solvers.schedule import Combination, Move, point, velocity
from lfm_fast.solvers.tableaus import HEUN

_FARTHEST = 3.0  # a step this much longer than the one before it is no longer extrapolated from it
_MOST_WEIGHT = 20.0  # of a step, the sum of its weights' sizes: 12 for five velocities on an even grid


@dataclass(frozen=True)
class AdamsBashforth:
    """z_(n+1) = z_n + integral over the step of the polynomial through the last `order` velocities.

    The first order - 1 steps are Heun's, so N steps make N + order - 1 evaluations. order: 2 or 3; later ones would
    need a better start.

    Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", section III.5 (variable steps).
    """

    order: int

    def __post_init__(self):
        if type(self.order) is not int or self.order not in (2, 3):
            raise ValueError(f"AdamsBashforth: order is {self.order!r}, expected 2 or 3.")

    @property
    def name(self):
        return f"ab{self.order}"

    def evaluations(self, num_steps):
        return num_steps + min(self.order - 1, num_steps)

    def schedule(self, times, path):
        heun, moves, known = RungeKutta("heun", HEUN), [], []  # known: (time, move) of the velocities at grid times
        for n, (before, after) in enumerate(pairwise(times)):
            first = len(moves)
            known = [(before, first), *known][: self.order]
            if n < self.order - 1:
                moves += heun.step(first, before, after)
                continue
            moves.append(Move(before, point(first) + _integral(known, before, after)))
        return moves


@dataclass(frozen=True)
class AdamsBashforthMoulton:
    """An Adams-Bashforth step whose result Adams and Moulton's formula corrects once the velocity there is known.

        p_(n+1) = z_n + integral over the step of the polynomial through v_n, ..., v_(n+1-order),  v_n = v(t_n, p_n)
        z_(n+1) = z_n + integral over the step of the polynomial through v_(n+1) too

    The corrected state goes into the next step only, so the correction costs no evaluation: N steps make N. The first
    step knows one velocity, the next two, and so on. They limit the order of convergence to 3; what more velocities
    make small is the error of all other steps, and a grid that is dense at its start, as "logit" is, that of the first
    ones. Where steps grow fast, extrapolation magnifies the velocities' errors: a step takes so many of them that its
    weights' sizes sum to 20 at most.
    solver_order: velocities of the prediction, 2 to 5. With 6 the errors of the embedded flow grow at 35 steps.

    Source: Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", sections III.1 (the pair) and III.5
    (variable steps).
    """

    solver_order: int = 5
    order = 3

    def __post_init__(self):
        if type(self.solver_order) is not int or self.solver_order not in (2, 3, 4, 5):
            raise ValueError(f"AdamsBashforthMoulton: solver_order is {self.solver_order!r}, expected 2, 3, 4 or 5.")

    @property
    def name(self):
        return f"abm{self.solver_order}"

    def evaluations(self, num_steps):
        return num_steps

    def schedule(self, times, path):
        moves, known = [], []  # known: (time, move) of the last velocities, newest first
        ahead = shift = Combination({})  # of the predicted step; from the predicted point to the corrected one
        for n, (before, after) in enumerate(pairwise(times)):
            known = [(before, n), *known]
            if n > 0:
                shift = _integral(known, times[n - 1], before) - ahead
            known = known[: self.solver_order]
            while sum(map(abs, _weights(known, before, after))) > _MOST_WEIGHT:
                known = known[:-1]
            ahead = _integral(known, before, after)
            moves.append(Move(before, point(n) + shift + ahead))
        return moves


def _integral(known, start, end):
    """The integral from start to end of the polynomial through velocities: known, (time, its move) of each."""
    total = Combination({})
    for (_, j), weight in zip(known, _weights(known, start, end)):
        total += ((end - start) * weight) * velocity(j)
    return total


def _weights(known, start, end):
    """Of the velocities in that integral, as shares of the step."""
    nodes = [(t - start) / (end - start) for t, _ in known]
    return lagrange_weights(nodes, [1 / (m + 1) for m in range(len(nodes))])


def lagrange_weights(nodes, moments):
    """Weights w_j with sum_j w_j f(nodes_j) = L f for every polynomial f of a lower degree than there are nodes, L
    being linear with L s^m = moments[m]."""
    weights = []
    for own in nodes:
        coefficients = [1.0]  # of the polynomial that is 1 at this node and 0 at the others, lowest power first
        for other in nodes:
            if other != own:
                lower, upper = [*(-other * c for c in coefficients), 0.0], [0.0, *coefficients]
                coefficients = [(a + b) / (own - other) for a, b in zip(lower, upper)]
        weights.append(sum(c * moment for c, moment in zip(coefficients, moments)))
    return weights


class _Grid:
    """A path at the grid's times; point and velocity i stand at time i.

    A step from s to t at constant data D is exactly x_t = alpha_t D + sigma_t noise, whatever the path; with
    lambda = log(alpha / sigma) and h = lambda_t - lambda_s it is (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) D.
    """

    def __init__(self, times, path):
        self.at = marginals(path, times)
        if times[0] < times[-1]:  # the mirror image: noise is predicted, and lambda grows again
            self.at = [Marginal(at.sigma, at.alpha, at.d_sigma, at.d_alpha) for at in self.at]
        self.lambdas = [_log(at.alpha) - _log(at.sigma) for at in self.at]
        self.data = [at.data(i) for i, at in enumerate(self.at)]

    def order(self, i, most):
        """How many data predictions the step from time i may use: not across a jump of the signal-to-noise ratio, of
        which the steps to sigma = 0 and from alpha = 0 are infinite ones."""
        steps = [after - before for before, after in pairwise(self.lambdas[max(0, i + 1 - most) : i + 2])]
        order, longer = 1, steps.pop()
        while steps and steps[-1] < math.inf and longer <= _FARTHEST * steps[-1]:
            order, longer = order + 1, steps.pop()
        return order

    def first_order(self, i):
        """Point i + 1 where data and noise stay as they are at time i."""
        return self.at[i + 1].alpha * self.data[i] + self.at[i + 1].sigma * self.at[i].noise(i)

    def weight(self, i):
        """alpha_t (1 - e^-h) of the step from time i."""
        s, t = self.at[i], self.at[i + 1]
        return t.alpha - s.alpha * t.sigma / s.sigma

    def further(self, i, order, known_after=False):
        """What predictions of data before time i (order - 1 of them), and after the step, add to the first-order step.

        The integral of e^(lambda - lambda_t) D over the step, D being a polynomial in lambda; a straight line through
        two known values is integrated by its value in the middle, as both papers have it.
        """
        weight, nodes, lambdas = self.weight(i), range(i - order + 1, i + 1 + known_after), self.lambdas
        if len(nodes) == 1:
            return Combination({})
        h = lambdas[i + 1] - lambdas[i]
        if len(nodes) == 2:
            ahead = 0.5 if known_after else 0.5 * h / (lambdas[i] - lambdas[i - 1])
            return (weight * ahead) * (self.data[nodes[1]] - self.data[nodes[0]])
        weights = lagrange_weights([(lambdas[j] - lambdas[i]) / h for j in nodes], _moments(h, len(nodes)))
        total = -weight * self.data[i]
        for j, own in zip(nodes, weights):
            total += (self.at[i + 1].alpha * own) * self.data[j]
        return total


def _log(x):
    return math.log(x) if x > 0.0 else -math.inf


def _moments(h, count):
    """h times the integral of e^(-h (1 - s)) s^m over s in [0, 1], for m < count."""
    moments = [-math.expm1(-h)]
    for m in range(1, count):
        if abs(h) > 1.0:
            moments.append(1.0 - m / h * moments[-1])
        else:  # there the recurrence loses all digits; the series is h m! sum_k (-h)^k / (m + k + 1)!
            term = total = h / (m + 1)
            for k in range(m + 2, m + 18):
                term *= -h / k
                total += term
            moments.append(total)
    return moments


@dataclass(frozen=True)
class DPMSolverPP2M:
    """DPM-Solver++(2M): data predicted by a straight line in lambda = log(alpha / sigma) through two evaluations.

        x_t = (sigma_t / sigma_s) x_s + alpha_t (1 - e^-h) (D_s + h / (2 h_before) (D_s - D_before))

    The first step, one from alpha = 0 or to sigma = 0, and one more than three times as long in lambda as the step
    before are of first order. From data to noise, noise is predicted in the same way.

    Source: Lu et al., arXiv 2211.01095, algorithm 2, the velocity giving D.
    """

    name = "dpmpp_2m"
    order = 2

    def evaluations(self, num_steps):
        return num_steps

    def schedule(self, times, path):
        grid, moves = _Grid(times, path), []
        for i, before in enumerate(times[:-1]):
            target = grid.first_order(i) + grid.further(i, grid.order(i, most=2))
            moves.append(Move(before, target))
        return moves


@dataclass(frozen=True)
class UniPC:
    """UniPC: a predictor of order `solver_order` whose result is corrected once the velocity there is known.

    The corrected state goes into the next step only, so that the correction costs no evaluation; with B(h) = e^h - 1
    ("bh2"). The order of convergence is solver_order + 1, but no more than 3, the first step being of first order.
    First-order steps are those of DPMSolverPP2M.
    solver_order: 1, 2 or 3. Source: Zhao et al., arXiv 2302.04867, algorithms 1 and 2.
    """

    solver_order: int = 2
    name = "unipc"

    def __post_init__(self):
        if type(self.solver_order) is not int or self.solver_order not in (1, 2, 3):
            raise ValueError(f"UniPC: solver_order is {self.solver_order!r}, expected 1, 2 or 3.")

    @property
    def order(self):
        return min(self.solver_order + 1, 3)

    def evaluations(self, num_steps):
        return num_steps

    def schedule(self, times, path):
        grid, moves = _Grid(times, path), []
        orders = [grid.order(i, self.solver_order) for i in range(len(times) - 1)]
        ahead = shift = Combination(
            {}
        )  # of the predictor beyond first order; from the predicted point to the corrected
        for i, before in enumerate(times[:-1]):
            if i > 0:
                shift = grid.further(i - 1, orders[i - 1], known_after=True) - ahead
            ahead = grid.further(i, orders[i])
            target = grid.first_order(i) + ahead
            if shift.weights:
                target += (grid.at[i + 1].sigma / grid.at[i].sigma) * shift
            moves.append(Move(before, target))
        return moves
