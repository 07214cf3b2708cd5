"""One optimizer step and the exponential moving average over the parameters of a network."""

import torch
from torch import Tensor

import lfm_fast
from benchmarks.workloads import Workload
from lfm_fast import ops

SETTINGS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
EMA_DECAY, STEP = 0.99, 10


class State:
    """Parameters, gradients, moments and average, all drawn, in the middle of a training."""

    def __init__(self, shapes, dtype=torch.float32, device="cpu"):
        generator = torch.Generator(device).manual_seed(0)

        def draw(scale):
            return [(scale * torch.randn(shape, generator=generator, device=device)).to(dtype) for shape in shapes]

        self.parameters, self.gradients, self.exp_avg = draw(0.1), draw(1e-2), draw(1e-2)
        self.exp_avg_sq, self.averaged = [x.square() for x in draw(1e-2)], draw(0.1)

    def optimizer(self, **how) -> torch.optim.AdamW:
        """PyTorch's, set to go on from here."""
        optimizer = torch.optim.AdamW(self.parameters, **SETTINGS, **how)
        for parameter, gradient, m, v in zip(self.parameters, self.gradients, self.exp_avg, self.exp_avg_sq):
            parameter.grad = gradient
            step = torch.tensor(float(STEP - 1), device=parameter.device if how.get("fused") else "cpu")
            optimizer.state[parameter] = {"step": step, "exp_avg": m, "exp_avg_sq": v}
        return optimizer


class OptimizerStep(Workload):
    """ops.adamw_ema over every parameter of a network; its result are the new parameters and averages."""

    def __init__(self, network: str, device: str = "cpu", **settings):
        with torch.device("meta"):
            model = lfm_fast.create_model(network, **settings)
        self.shapes, self.device = [p.shape for p in model.parameters() if p.requires_grad], device
        self.state = State(self.shapes, device=device)
        count = sum(p.numel() for p in self.state.parameters)
        self.moved, self.flops = 4 * count * 9, 16 * count  # five tensors read, four written
        self.note = f"{len(self.shapes)} tensors, {count / 1e6:.0f} M parameters"
        self.schedule = torch.tensor([SETTINGS["lr"], STEP, EMA_DECAY], dtype=torch.float64, device=device)
        self.step = self._ours

    def _ours(self, state: State) -> None:
        beta1, beta2 = SETTINGS["betas"]
        tensors = (state.parameters, state.gradients, state.exp_avg, state.exp_avg_sq, state.averaged, [])
        ops.adamw_ema(self.schedule, *tensors, beta1, beta2, SETTINGS["eps"], SETTINGS["weight_decay"])

    def call(self):
        self.step(self.state)

    def compile(self) -> None:
        """PyTorch's optimizer and average, compiled as one graph (its documentation's recipe)."""
        self.step = self._torch_step(self.state, compiled=True)

    def result(self) -> list[Tensor]:
        return self._after_one(self.step)

    def truth(self) -> list[Tensor]:
        state = State(self.shapes, torch.float64, self.device)
        self._torch_step(state, foreach=False)(state)
        return [joined(state.parameters), joined(state.averaged)]

    def others(self):
        found = {}
        for name, how in {"AdamW + foreach EMA": {}, "AdamW(fused) + foreach EMA": {"fused": True}}.items():
            state = State(self.shapes, device=self.device)
            step = self._torch_step(state, **how)
            found[name] = (lambda step=step, state=state: step(state), lambda how=how: self._result_of(**how))
        return found

    def _result_of(self, **how) -> list[Tensor]:
        state = State(self.shapes, device=self.device)
        self._torch_step(state, **how)(state)
        return [joined(state.parameters), joined(state.averaged)]

    def _after_one(self, step) -> list[Tensor]:
        """The result of a step from the start, in the tensors that are timed (what is compiled holds on to them)."""
        fresh = State(self.shapes, device=self.device)
        for name in ("parameters", "exp_avg", "exp_avg_sq", "averaged"):
            torch._foreach_copy_(getattr(self.state, name), getattr(fresh, name))
        step(self.state)
        return [joined(self.state.parameters), joined(self.state.averaged)]

    @staticmethod
    def _torch_step(state: State, compiled: bool = False, **how):
        optimizer = state.optimizer(**how)

        def step(state):
            optimizer.step()
            torch._foreach_lerp_(state.averaged, state.parameters, 1 - EMA_DECAY)

        return torch.compile(step) if compiled else step


def joined(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])
