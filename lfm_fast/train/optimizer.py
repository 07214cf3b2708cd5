"""AdamW, gradient clipping and the moving average of the weights in one pass over them."""

import torch

from lfm_fast import ops
from lfm_fast.ops import _registry

_ROW = _registry.row(ops.adamw_ema)


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW(fused=True)` with the same state (step, exp_avg, exp_avg_sq): either goes on with the other's.

    Where `ops.adamw_ema` has a compiled backend for the tensors, a step is one call of it. Elsewhere it is what it
    would be without: torch's fused AdamW, and multi-tensor operations before and after it.
    """

    def __init__(self, parameters, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(parameters, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, gradient_scale=None, averaged=None, ema_decay=1.0, copies=None):
        """One step, then averaged <- ema_decay averaged + (1 - ema_decay) parameter, and copies <- parameter.

        gradient_scale: () float32 that every gradient is multiplied by. averaged: {parameter: its average}, which may
        hold parameters without a gradient too, or None. copies: {parameter: its copy in bfloat16, which has the
        gradient}, for all parameters, or None.
        """
        averaged, copies = averaged or {}, copies or {}
        calls = [
            call
            for group in self.param_groups
            for call in self._calls(group, gradient_scale, averaged, ema_decay, copies)
        ]
        if all(_ROW.choose(_ROW.bind(*call)) != "reference" for call in calls):
            self._step_in_one_pass(calls, averaged, ema_decay)
        else:
            self._step_of_torch(gradient_scale, averaged, ema_decay, copies)

    def _step_in_one_pass(self, calls, averaged, ema_decay):
        stepped = [p for call in calls for p in call[1]]
        torch._foreach_add_([self.state[p]["step"] for p in stepped], 1)
        for call in calls:
            ops.adamw_ema(*call)
        done = {id(p) for p in stepped}
        _follow({p: average for p, average in averaged.items() if id(p) not in done}, ema_decay)
        self._counts().update({p: (self.state[p]["step"], self._count(p) + 1) for p in stepped})

    def _step_of_torch(self, gradient_scale, averaged, ema_decay, copies):
        for parameter, low in copies.items():
            parameter.grad = None if low.grad is None else low.grad.to(parameter.dtype)
        if gradient_scale is not None:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_mul_(gradients, gradient_scale)
        super().step()
        if copies:
            torch._foreach_copy_(list(copies.values()), list(copies))
            self.zero_grad(set_to_none=True)
        self._counts().clear()
        _follow(averaged, ema_decay)

    def _calls(self, group, gradient_scale, averaged, ema_decay, copies):
        """The arguments of `ops.adamw_ema`: one call for the parameters that share a step count and have an average."""
        calls = {}
        for p in group["params"]:
            if copies.get(p, p).grad is None:
                continue
            if not self.state[p]:
                zeros = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in _MOMENTS}
                self.state[p].update(step=torch.zeros((), dtype=torch.float32, device=p.device), **zeros)
            calls.setdefault((self._count(p) + 1, p in averaged, p.device), []).append(p)
        settings = (*group["betas"], group["eps"], group["weight_decay"], gradient_scale)
        for (count, has_average, device), parameters in calls.items():
            schedule = torch.tensor([group["lr"], count, ema_decay], dtype=torch.float64).to(device, non_blocking=True)
            moments = ([self.state[p][name] for p in parameters] for name in _MOMENTS)
            averages = [averaged[p] for p in parameters] if has_average else []
            gradients = [copies.get(p, p).grad for p in parameters]
            low = [copies[p] for p in parameters] if copies else []
            yield (schedule, parameters, gradients, *moments, averages, low, *settings)

    def _count(self, parameter):
        """The steps done, remembered here: reading the tensor would wait for the device."""
        tensor = self.state[parameter]["step"]
        known, count = self._counts().get(parameter, (None, 0))
        if known is not tensor:
            count = int(tensor)
            self._counts()[parameter] = tensor, count
        return count

    def _counts(self):
        return self.__dict__.setdefault("_known_counts", {})  # copies of an optimizer are made without its attributes


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _follow(averaged, ema_decay):
    if averaged:
        torch._foreach_lerp_(list(averaged.values()), list(averaged), 1.0 - ema_decay)
