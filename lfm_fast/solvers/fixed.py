"""The executor of every method of fixed steps: a move is one evaluation of the field and one ops.guided_step.

Nothing in the loop waits for a device, and nothing but the field allocates in Python: times, weights and places are
made beforehand.
"""

import math

import torch

from lfm_fast.ops.guided_step import GuidedSteps
from lfm_fast.solvers.schedule import compile_schedule
from lfm_fast.solvers.solution import Solution


def integrate(formula, field, z, times, settings):
    """dz/dt = field(t, z) over the given times by a formula (see lfm_fast.solvers.schedule).

    field: see lfm_fast.solvers. z (B, ...) float32 or float64, the state at times[0]. times: floats, in either
    direction. settings: a Settings. Returns a Solution. Raises RuntimeError for a velocity that is not finite.
    """
    run = Run(formula, field, z, times, settings)
    watched = _reading_is_free(z)
    solution = run(settings.on_step, watched)
    if not watched and not bool(solution.z.isfinite().all()):
        run(watched=True)  # once more, to find out where
        run.check(solution.z)
    return solution


def _reading_is_free(z):
    """Whether the state may be looked at after every step; else it is once, at the end."""
    return z.device.type == "cpu"


class Run:
    """A method compiled for one field, state and grid. Calling it integrates, without reading anything back."""

    def __init__(self, formula, field, z, times, settings):
        self.program = compile_schedule(formula, times, settings.path)
        if hasattr(field, "prepare"):
            field.prepare(list(self.program.moments))
        field_at = getattr(field, "at", lambda time: field)
        fields = [field_at(time) for time in self.program.moments]
        self.moves = list(zip(fields, *self.program.numbers(z), self.program.instructions))
        self.blocks = (z[0].numel() + 3) // 4  # of the counter, that one normal takes
        self.z, self.times, self.settings = z, times, settings
        self.index = None
        if self.program.noise is not None:
            index = torch.arange(z.shape[0]) if settings.index is None else settings.index
            self.index = index.to(z.device)

    def __call__(self, on_step=None, watched=False):
        z, seed, steps, nfe, guided_step = self.z, self.settings.seed, 0, 0, GuidedSteps()
        states = [z] if self.settings.trajectory else None
        store = [None] * self.program.num_places
        store[0] = z
        for evaluate, t, weights, noise, (base, stored, noisy, draw, keep, keep_point, arrives) in self.moves:
            z, blended, _ = guided_step(
                store[base],
                *evaluate(t, z),
                [store[place] for place in stored],
                weights,
                None,  # no estimate of an error
                0.0,
                0.0,
                noise,
                self.index if noisy else None,
                seed,
                draw * self.blocks,
                keep is not None,
            )
            nfe += 1
            if keep is not None:
                store[keep] = blended
            if keep_point is not None:
                store[keep_point] = z
            if not arrives:
                continue
            steps += 1
            if watched and not math.isfinite(z.sum()):
                self.check(z, steps)
            if states is not None:
                states.append(z)
            if on_step is not None and on_step(steps, self.times[steps], z) is False:
                break
        # by on_step's word at the very last step nothing is left out
        reached = steps == len(self.times) - 1
        return Solution.shared(
            z, time=self.times[steps], nfe=nfe, accepted=steps, reached=reached, cancelled=not reached, states=states
        )

    def check(self, z, step=None):
        """Raise RuntimeError if z is not finite; step: number of the step that made it so, where that is known."""
        bad = (~z.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if not bad:
            return  # the sum overflowed, no element did
        where = "at some time (a second run went well)"
        if step is not None:
            ends = f"from t = {self.times[step - 1]:g} to {self.times[step]:g}"
            where = f"in step {step} of {len(self.times) - 1}, {ends}"
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise RuntimeError(f"The velocity is not finite, or too large, {where}, in sample {bad[0]}{more} of the batch.")
