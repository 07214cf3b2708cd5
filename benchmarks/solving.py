"""Solver workloads: fields whose exact solution is known to many digits, so that a solver's own error shows."""

import functools

import torch
from torch import Tensor

import lfm_fast
from benchmarks.names import AGAIN, FAST, REFERENCE
from benchmarks.workloads import LARGEST_ERROR, Contender, Workload

SCALE = 1.5  # guidance
TOLERANCE = 1e-5  # of the adaptive methods, relative and absolute: what sample and LFM have
ADAMS = 5e-4  # of adams: with it the errors of the embedded flow are no larger than those of torchdiffeq's dopri5 above
AT_EQUAL_ERROR = {"method": "abm5", "num_steps": 38, "time_grid": "logit"}  # nearer to the solution than dopri5 above
# our solver -> what a user of torchdiffeq would call, and its steps for an evaluation each
TWINS = {"euler": "euler", "midpoint": "midpoint", "heun": "heun2", "rk4": "rk4"}
TWINS |= {name: name for name in ("dopri5", "dopri8", "bosh3", "adaptive_heun")}


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
def field(name: str, dtype: torch.dtype, device="cpu"):
    """(model, null label, latent shape): "mixture", on a CPU, or "embedded", the flow that the package brings."""
    if name == "mixture":
        return Mixture(dtype), Mixture.null_label, Mixture.shape
    flow = lfm_fast.LatentFlow.from_pretrained("embedded")
    return flow.model.eval().to(device, dtype), flow.model.null_label, flow.latent_shape


@functools.cache
def start(name: str, batch_size: int, device="cpu") -> tuple[Tensor, Tensor]:
    """Noise (B, C, h, w) and labels (B,)."""
    _, null_label, shape = field(name, torch.float32, device)
    return lfm_fast.noise(batch_size, shape, seed=11, device=device), torch.arange(
        batch_size, device=device
    ) % null_label


@functools.cache
def solution(name: str, batch_size: int, num_steps: int, device="cpu") -> tuple[Tensor, str]:
    """z_0 by `num_steps` RK4 steps in float64, and how far half as many are from it, by a few samples."""
    z_1, y = start(name, batch_size, device)
    model, null_label, _ = field(name, torch.float64, device)

    def solve(count, steps):
        settings = {"y": y[:count], "guidance_scale": SCALE, "null_label": null_label, "method": "rk4"}
        return lfm_fast.sample(model, z_1[:count].double(), num_steps=steps, **settings)

    fine, few = solve(batch_size, num_steps), min(batch_size, 4)
    uncertainty = float(errors(solve(few, num_steps // 2), fine[:few]).max())
    return fine, f"solution by {num_steps} RK4 steps in float64; half as many differ by {uncertainty:.0e}"


def errors(got: Tensor, want: Tensor) -> Tensor:
    """|got - want| / |want| by sample, (B,) float64."""
    difference = got.double() - want.double()
    return difference.flatten(1).norm(dim=1) / want.double().flatten(1).norm(dim=1)


def spread(found: Tensor) -> dict:
    return {"error": float(found.median()), "error_p90": float(found.quantile(0.9))}


class Solving(Workload):
    """lfm_fast.sample with one method against the solution of the differential equation itself."""

    device = "cpu"

    def __init__(self, field_name: str, method: str, num_steps: int, batch_size: int, reference_steps: int):
        self.field_name, self.method, self.num_steps = field_name, method, num_steps
        self.batch_size = self.images = batch_size
        self.reference_steps = reference_steps
        self.model, self.null_label, _ = field(field_name, torch.float32, self.device)
        self.z_1, self.y = start(field_name, batch_size, self.device)
        self.nfe: dict[str, int] = {}

    def call(self):
        return self._sample()

    def _sample(self, method=None, **more):
        settings = {"y": self.y, "guidance_scale": SCALE, "null_label": self.null_label, "num_steps": self.num_steps}
        return lfm_fast.sample(self.model, self.z_1, method=method or self.method, **settings, **more)

    def result(self) -> list[Tensor]:
        z_0, stats = self._sample(return_stats=True)
        self.nfe[FAST] = self.nfe[REFERENCE] = round(float(stats.nfe.double().mean()), 1)
        return [z_0]

    def facts(self, name, seconds):
        return {"nfe": self.nfe[name]} if name in self.nfe else {}

    def largest_error(self, errors):
        """The method's own error is most of it; two formulas of one order, such as of rk4, differ by a factor.

        Two ways to control the error by a tolerance differ by more: what they have in common is that.
        """
        fixed = lfm_fast.solvers.get_solver(self.method).evaluations is not None
        return (3 * min(errors) if fixed else 300 * TOLERANCE) + LARGEST_ERROR[self.precision]

    def truth(self) -> list[Tensor]:
        z_0, self.note = solution(self.field_name, self.batch_size, self.reference_steps, self.device)
        return [z_0]

    def others(self):
        if self.method not in TWINS:
            return {}
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

        fixed = lfm_fast.solvers.get_solver(self.method).evaluations is not None
        options = {"step_size": 1 / self.num_steps} if fixed else None
        with torch.no_grad():
            settings = {"method": TWINS[self.method], "atol": TOLERANCE, "rtol": TOLERANCE, "options": options}
            return odeint(velocity, self.z_1, self.z_1.new_tensor([1.0, 0.0]), **settings)[-1]


class AtEqualError(Solving):
    """A method of ours against torchdiffeq's dopri5 at 1e-5, told to come as near: the same network on both sides.

    ours: a method and what it is told, of an error by sample no larger in the median and the 90th percentile.
    """

    measures_memory = False

    def __init__(
        self, field_name: str, ours: dict, batch_size: int, reference_steps: int, rounds: int, device: str = "cpu"
    ):
        self.device = device
        super().__init__(field_name, "dopri5", 1, batch_size, reference_steps)
        self.ours, self.rounds, self.by_sample = ours, rounds, {}

    def contenders(self):
        def ours(name, **settings):
            arguments = {"y": self.y, "guidance_scale": SCALE, "null_label": self.null_label, **settings}

            def call():
                return lfm_fast.sample(self.model, self.z_1, return_stats=True, **arguments)

            def result():
                z_0, stats = call()
                return self.noted(name, z_0, float(stats.nfe.double().mean()))

            return Contender(call, result)

        def theirs():
            count = []
            z_0 = self._torchdiffeq(on_call=lambda: count.append(1))
            return self.noted("torchdiffeq dopri5", z_0, len(count))

        found = {FAST: ours(FAST, **self.ours), AGAIN: Contender(ours(AGAIN, **self.ours).call)}
        found["adams, by sample"] = ours("adams, by sample", method="adams", atol=ADAMS, rtol=ADAMS)
        found["dopri5, by sample"] = ours("dopri5, by sample", method="dopri5", atol=TOLERANCE, rtol=TOLERANCE)
        return found | {"torchdiffeq dopri5": Contender(self._torchdiffeq, theirs)}

    def largest_error(self, errors):
        return 0.05  # of all samples together, which is that of the few that lie between two pictures

    def check(self):
        """Fail where ours is further from the solution: then there is nothing to compare the times at."""
        ours, theirs = self.by_sample[FAST], self.by_sample["torchdiffeq dopri5"]
        assert all(ours[key] <= theirs[key] for key in theirs), f"errors by sample {ours}, torchdiffeq's {theirs}"

    def noted(self, name, z_0, nfe):
        """The result of a contender, whose error by sample is remembered."""
        self.nfe[name] = round(nfe, 1)
        self.by_sample[name] = spread(errors(z_0, self.truth_of(name)[0]))
        return [z_0]

    def facts(self, name, seconds):
        found = self.by_sample.get(name, {})
        return super().facts(name, seconds) | {f"{key}_by_sample": value for key, value in found.items()}


class Overhead(Workload):
    """What the solver adds to each evaluation of a field that costs nothing, for one sample."""

    measures_memory = False
    shape = (1, 4, 16, 16)

    def __init__(self, method: str, num_steps: int):
        self.method, self.num_steps = method, num_steps
        self.evaluations = lfm_fast.solvers.get_solver(method).evaluations(num_steps)
        self.z_1, self.velocity = (lfm_fast.noise(1, self.shape[1:], seed=seed) for seed in (1, 2))

    def call(self):
        velocity = self.velocity
        return lfm_fast.sample(lambda t, z: velocity, self.z_1, method=self.method, num_steps=self.num_steps)

    def truth(self):
        return [self.z_1.double() - self.velocity.double()]

    def facts(self, name, seconds):
        return {"nfe": self.evaluations, "microseconds_per_evaluation": 1e6 * seconds / self.evaluations}

    def largest_error(self, errors):
        return 1e-7 * self.num_steps  # of each step a rounding, 2^-24 of a state of the size of the result

    def others(self):
        if self.method not in TWINS:
            return {}
        return {f"torchdiffeq {TWINS[self.method]}": (self._torchdiffeq, lambda: [self._torchdiffeq()])}

    def _torchdiffeq(self):
        from torchdiffeq import odeint

        velocity, times = self.velocity, torch.tensor([1.0, 0.0])
        with torch.no_grad():
            options = {"step_size": 1 / self.num_steps}
            return odeint(lambda t, z: velocity, self.z_1, times, method=TWINS[self.method], options=options)[-1]
