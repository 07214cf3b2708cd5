"""Solver workloads: fields whose exact solution is known to many digits, so that a solver's own error shows."""

import functools

import torch
from torch import Tensor

import lfm_fast
from benchmarks.names import FAST, REFERENCE
from benchmarks.workloads import LARGEST_ERROR, Workload, relative_error

SCALE = 1.5  # guidance
# our solver -> what a user of torchdiffeq would call, and its steps for an evaluation each
TWINS = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk4": "rk4", "dopri5": "dopri5"}


class Mixture:
    """The exact velocity of the straight path from Gaussian noise to a mixture of Gaussians N(mean_k, spread^2 I).

        v(t, z) = sum_k p(k | z) (E[z_1 | z, k] - E[z_0 | z, k]),   z = (1 - t) z_0 + t z_1

    Label c keeps the components k = c mod the number of classes; the label after the last means none. A flow as sharp
    as a trained one, at next to no cost: what is left of the time is the solver's.
    """

    num_classes, null_label, shape = 4, 4, (4, 16, 16)

    def __init__(self, dtype: torch.dtype, components: int = 8, spread: float = 0.5):
        generator = torch.Generator().manual_seed(3)
        numel = self.shape[0] * self.shape[1] * self.shape[2]
        # close enough for neighbours to compete: at this distance the label is decided half way, not at the start
        self.means = (0.1 * torch.randn(components, numel, generator=generator, dtype=torch.float64)).to(dtype)
        self.spread = spread
        label = torch.arange(components) % self.num_classes
        kept = torch.stack([label == c for c in range(self.num_classes)] + [torch.ones_like(label, dtype=torch.bool)])
        self.log_weights = torch.where(kept, 0.0, -torch.inf).to(dtype)  # (labels, components)

    def __call__(self, t: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        state, t = z.flatten(1), t.to(z.dtype)[:, None]
        labels = torch.full((len(z),), self.null_label) if y is None else y
        alpha, variance = 1 - t, (1 - t) ** 2 * self.spread**2 + t**2  # of z given k: N(alpha mean_k, variance I)
        from_means = state[:, None] - alpha[:, :, None] * self.means  # (B, components, numel)
        share = (self.log_weights[labels] - from_means.square().sum(2) / (2 * variance)).softmax(1)
        mean = share @ self.means  # of z_0's component, (B, numel)
        return ((t - alpha * self.spread**2) / variance * (state - alpha * mean) - mean).view(z.shape)


@functools.cache
def field(name: str, dtype: torch.dtype):
    """(model, null label, latent shape): "mixture", or "embedded", the flow that the package brings."""
    if name == "mixture":
        return Mixture(dtype), Mixture.null_label, Mixture.shape
    flow = lfm_fast.LatentFlow.from_pretrained("embedded")
    return flow.model.eval().to(dtype), flow.model.null_label, flow.latent_shape


@functools.cache
def start(name: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """Noise (B, C, h, w) and labels (B,)."""
    _, null_label, shape = field(name, torch.float32)
    return lfm_fast.noise(batch_size, shape, seed=11), torch.arange(batch_size) % null_label


@functools.cache
def solution(name: str, batch_size: int, num_steps: int) -> tuple[Tensor, float]:
    """z_0 by `num_steps` RK4 steps in float64, and how far half as many steps are from it."""
    z_1, y = start(name, batch_size)
    model, null_label, _ = field(name, torch.float64)
    settings = {"y": y, "guidance_scale": SCALE, "null_label": null_label, "method": "rk4"}
    fine, coarse = (lfm_fast.sample(model, z_1.double(), num_steps=n, **settings) for n in (num_steps, num_steps // 2))
    return fine, relative_error([coarse], [fine])


class Solving(Workload):
    """lfm_fast.sample with one method against the solution of the differential equation itself."""

    def __init__(self, field_name: str, method: str, num_steps: int, batch_size: int, reference_steps: int):
        self.field_name, self.method, self.num_steps = field_name, method, num_steps
        self.batch_size = self.images = batch_size
        self.reference_steps = reference_steps
        self.model, self.null_label, _ = field(field_name, torch.float32)
        self.z_1, self.y = start(field_name, batch_size)
        self.nfe: dict[str, int] = {}

    def call(self):
        return self._sample()

    def _sample(self, method=None, **more):
        settings = {"y": self.y, "guidance_scale": SCALE, "null_label": self.null_label, "num_steps": self.num_steps}
        return lfm_fast.sample(self.model, self.z_1, method=method or self.method, **settings, **more)

    def result(self) -> list[Tensor]:
        z_0, stats = self._sample(return_stats=True)
        self.nfe[FAST] = self.nfe[REFERENCE] = int(stats.nfe.max())
        return [z_0]

    def facts(self, name, seconds):
        return {"nfe": self.nfe[name]} if name in self.nfe else {}

    def largest_error(self, errors):
        """The method's own error is most of it; two formulas of one order, such as of rk4, differ by a factor."""
        return 3 * min(errors) + LARGEST_ERROR[self.precision]

    def truth(self) -> list[Tensor]:
        z_0, uncertainty = solution(self.field_name, self.batch_size, self.reference_steps)
        self.note = f"solution by {self.reference_steps} RK4 steps in float64; half as many differ by {uncertainty:.0e}"
        return [z_0]

    def others(self):
        name = f"torchdiffeq {TWINS[self.method]}"
        return {name: (self._torchdiffeq, lambda: self._counted(name))}

    def _counted(self, name: str) -> list[Tensor]:
        count = []
        z_0 = self._torchdiffeq(on_call=lambda: count.append(1))
        self.nfe[name] = len(count)
        return [z_0]

    def _torchdiffeq(self, on_call=None) -> Tensor:
        """The way to guide with torchdiffeq: both velocities from one call, blended by hand."""
        from torchdiffeq import odeint

        labels = torch.cat([self.y, torch.full_like(self.y, self.null_label)])

        def velocity(t, z):
            if on_call is not None:
                on_call()
            both = self.model(t.expand(2 * len(z)), torch.cat([z, z]), labels)
            return SCALE * both[: len(z)] + (1 - SCALE) * both[len(z) :]

        options = None if self.method == "dopri5" else {"step_size": 1 / self.num_steps}
        with torch.no_grad():
            settings = {"method": TWINS[self.method], "atol": 1e-5, "rtol": 1e-5, "options": options}
            return odeint(velocity, self.z_1, torch.tensor([1.0, 0.0]), **settings)[-1]
