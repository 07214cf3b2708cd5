"""Probability paths, the one place of the time convention: t = 0 is data, t = 1 is noise.

    z_t = alpha(t) z_0 + sigma(t) z_1,    z_1 ~ N(0, I)
    u_t = alpha'(t) z_0 + sigma'(t) z_1   (the conditional velocity, a network's target)

Sampling integrates dz/dt = E[u_t | z_t] from t = 1 to t = 0. A path is four functions of t; the conversions between
velocity, score, noise and data are algebra on them and stand once, in `Path`. All of them are functions of the
MARGINAL quantities too: they are linear, so they map E[u_t | z_t] to E[z_0 | z_t], E[z_1 | z_t] and grad log p_t(z_t)
= -E[z_1 | z_t] / sigma(t).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar

import torch

from lfm_fast import ops

# No path is asked for t closer to 0 than this where its velocity has no limit at 0.
SINGULAR_T_MIN = 1e-5


def _per_sample(values, z):
    """(B,) or () -> a shape that multiplies z (B, ...) sample by sample, in the dtype of z."""
    return values.to(z.dtype).reshape(values.shape + (1,) * (z.ndim - values.ndim) if values.ndim else ())


class Path(ABC):
    """z_t = alpha(t) z_0 + sigma(t) z_1 with t = 0 data and t = 1 noise.

    Subclasses give `alpha`, `sigma`, `d_alpha`, `d_sigma`: functions of a float tensor t of any shape, same shape and
    dtype out. `t_min` and `t_max` bound the times at which all four are finite; training draws t inside them,
    sampling stays inside them.
    """

    t_min: ClassVar[float] = 0.0
    t_max: ClassVar[float] = 1.0

    @abstractmethod
    def alpha(self, t):
        """The factor of the data z_0."""

    @abstractmethod
    def sigma(self, t):
        """The factor of the noise z_1."""

    @abstractmethod
    def d_alpha(self, t):
        """d alpha / dt."""

    @abstractmethod
    def d_sigma(self, t):
        """d sigma / dt."""

    def prior(self, z_1):
        """The state at t = 1 that sampling starts from: sigma(1) z_1.

        Exact where alpha(1) = 0; elsewhere (VarianceExploding) it leaves out the data, small beside sigma(1).
        z_1 (B, ...) standard normal -> (B, ...), same dtype.
        """
        return _per_sample(self.sigma(torch.ones((), dtype=torch.float64, device=z_1.device)), z_1) * z_1

    def coefficients(self, t):
        """alpha, sigma, d_alpha, d_sigma at t (B,), stacked to (4, B); computed in float64, in the dtype of t."""
        t64 = t.to(torch.float64)
        return torch.stack([self.alpha(t64), self.sigma(t64), self.d_alpha(t64), self.d_sigma(t64)]).to(t.dtype)

    def interpolate(self, z_0, z_1, t):
        """(z_t, target): z_t = alpha z_0 + sigma z_1, target = d_alpha z_0 + d_sigma z_1.

        z_0, z_1 (B, ...), t (B,); both results (B, ...) in the dtype of z_0.

        >>> z_t, target = Linear().interpolate(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25]))
        >>> z_t.tolist(), target.tolist()
        ([[0.25, 0.25]], [[1.0, 1.0]])
        """
        dtype = torch.float64 if z_0.dtype == torch.float64 else torch.float32
        return ops.interpolate(z_0, self.coefficients(t.to(torch.float64)).to(dtype), z_1=z_1)

    def _solve(self, t, like):
        """alpha, sigma, d_alpha, d_sigma and alpha d_sigma - sigma d_alpha, computed in float64, to multiply z."""
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t.to(torch.float64))
        determinant = alpha * d_sigma - sigma * d_alpha
        return tuple(_per_sample(c, like) for c in (alpha, sigma, d_alpha, d_sigma, determinant))

    # (z_t, u_t) and (z_0, z_1) are one linear map of each other, of determinant alpha sigma' - sigma alpha'; so
    # knowing z_t and one of velocity, noise, data, the others follow. t (B,); z, velocity, noise, data, score (B, ...).

    def data_from_velocity(self, velocity, z, t):
        """z_0 = (sigma' z_t - sigma u) / (alpha sigma' - sigma alpha')."""
        _, sigma, _, d_sigma, determinant = self._solve(t, z)
        return (d_sigma * z - sigma * velocity) / determinant

    def noise_from_velocity(self, velocity, z, t):
        """z_1 = (alpha u - alpha' z_t) / (alpha sigma' - sigma alpha')."""
        alpha, _, d_alpha, _, determinant = self._solve(t, z)
        return (alpha * velocity - d_alpha * z) / determinant

    def score_from_velocity(self, velocity, z, t):
        """grad log p_t(z) = -z_1 / sigma; infinite where sigma = 0."""
        alpha, sigma, d_alpha, _, determinant = self._solve(t, z)
        return (d_alpha * z - alpha * velocity) / (determinant * sigma)

    def velocity_from_data(self, data, z, t):
        """u = (sigma' z_t - (alpha sigma' - sigma alpha') z_0) / sigma; needs sigma > 0."""
        _, sigma, _, d_sigma, determinant = self._solve(t, z)
        return (d_sigma * z - determinant * data) / sigma

    def velocity_from_noise(self, noise, z, t):
        """u = (alpha' z_t + (alpha sigma' - sigma alpha') z_1) / alpha; needs alpha > 0."""
        alpha, _, d_alpha, _, determinant = self._solve(t, z)
        return (d_alpha * z + determinant * noise) / alpha

    def velocity_from_score(self, score, z, t):
        """u = (alpha' z_t - (alpha sigma' - sigma alpha') sigma score) / alpha; needs alpha > 0."""
        alpha, sigma, d_alpha, _, determinant = self._solve(t, z)
        return (d_alpha * z - determinant * sigma * score) / alpha


@dataclass(frozen=True)
class Linear(Path):
    """The straight path: z_t = (1 - t) z_0 + (sigma_min + (1 - sigma_min) t) z_1, u = (1 - sigma_min) z_1 - z_0.

    sigma_min = 0 is the optimal-transport path of Lipman et al. (arXiv 2210.02747, section 4.1, time reversed); LFM
    trains with sigma_min = 1e-5 (arXiv 2307.08698, section 3).
    """

    sigma_min: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.sigma_min < 1.0:
            raise ValueError(f"Linear: sigma_min is {self.sigma_min}, expected a number in [0, 1).")

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return self.sigma_min + (1 - self.sigma_min) * t

    def d_alpha(self, t):
        return torch.full_like(t, -1.0)

    def d_sigma(self, t):
        return torch.full_like(t, 1 - self.sigma_min)


@dataclass(frozen=True)
class VariancePreserving(Path):
    """alpha = exp(-1/2 int_0^t beta), sigma = sqrt(1 - alpha^2), beta(s) = beta_min + s (beta_max - beta_min).

    The diffusion of Song et al. (arXiv 2011.13456, eq. 32-33) as a path (arXiv 2210.02747, section 4.1). sigma' grows
    like t^(-1/2) at 0, so t_min = 1e-5; sigma is written with expm1, as 1 - alpha^2 loses all digits there.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: ClassVar[float] = SINGULAR_T_MIN

    def __post_init__(self):
        if not 0.0 < self.beta_min <= self.beta_max < math.inf:
            raise ValueError(
                f"VariancePreserving needs 0 < beta_min <= beta_max; they are {self.beta_min} and {self.beta_max}."
            )

    def _beta(self, t):
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def _integral(self, t):
        return t * self.beta_min + 0.5 * t * t * (self.beta_max - self.beta_min)

    def alpha(self, t):
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t):
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def d_alpha(self, t):
        return -0.5 * self._beta(t) * self.alpha(t)

    def d_sigma(self, t):
        return 0.5 * self._beta(t) * torch.exp(-self._integral(t)) / self.sigma(t)  # sigma sigma' = -alpha alpha'


@dataclass(frozen=True)
class VariancePreservingTrig(Path):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): a quarter turn (Albergo et al., arXiv 2303.08797; SiT's "GVP")."""

    def alpha(self, t):
        return torch.cos(0.5 * math.pi * t)

    def sigma(self, t):
        return torch.sin(0.5 * math.pi * t)

    def d_alpha(self, t):
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * t)

    def d_sigma(self, t):
        return 0.5 * math.pi * torch.cos(0.5 * math.pi * t)


@dataclass(frozen=True)
class VarianceExploding(Path):
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (Song et al., arXiv 2011.13456, eq. 31).

    At t = 0 a noise of sigma_min remains; the state at t = 1 is z_0 + sigma_max z_1, of which `prior` keeps the noise.
    """

    sigma_min: float
    sigma_max: float

    def __post_init__(self):
        if not 0.0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                f"VarianceExploding needs 0 < sigma_min < sigma_max; they are {self.sigma_min} and {self.sigma_max}."
            )

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))

    def d_alpha(self, t):
        return torch.zeros_like(t)

    def d_sigma(self, t):
        return math.log(self.sigma_max / self.sigma_min) * self.sigma(t)


# name -> class, for command lines and configurations; a new path is one class and one line here
PATHS = {
    "linear": Linear,
    "vp": VariancePreserving,
    "vp-trig": VariancePreservingTrig,
    "ve": VarianceExploding,
}


def make_path(name, **arguments):
    """The path called `name` with its arguments, as in make_path("linear", sigma_min=1e-5).

    Raises ValueError for an unknown name or argument.
    """
    if not isinstance(name, str) or name not in PATHS:
        raise ValueError(f"Unknown path {name!r}; there are {', '.join(PATHS)}.")
    try:
        return PATHS[name](**arguments)
    except TypeError as error:
        raise ValueError(f"Path {name!r} does not take these arguments ({error}).") from error


def path_of(model):
    """The path that a model says it was trained on, or None; looks into wrappers such as DistributedDataParallel."""
    own = getattr(model, "path", None)
    if isinstance(own, Path):
        return own
    inner = getattr(model, "module", None) if isinstance(model, torch.nn.Module) else None
    return path_of(inner) if isinstance(inner, torch.nn.Module) else None


def agree(one, other):
    """Whether two paths are one, but for what a tiny sigma_min or a table in float32 makes of it."""
    low, high = max(one.t_min, other.t_min), min(one.t_max, other.t_max)
    times = torch.linspace(low, high, 33, dtype=torch.float64)
    alphas_and_sigmas = (path.coefficients(times)[:2] for path in (one, other))
    return one == other or torch.allclose(*alphas_and_sigmas, rtol=1e-4, atol=1e-4)


def describe(path):
    """The inverse of `make_path`: {"name": ..., **arguments}, JSON-able, so make_path(**describe(path)) == path."""
    for name, kind in PATHS.items():
        if kind is type(path):
            return {"name": name, **asdict(path)}
    raise ValueError(f"{type(path).__name__} is no path of the registry ({', '.join(PATHS)}), so it cannot be written.")
