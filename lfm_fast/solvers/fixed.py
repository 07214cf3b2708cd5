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
    return run.watched(settings.on_step)


def _reading_is_free(z):
    """Whether the state may be looked at after every step; else it is once, at the end."""
    return z.device.type == "cpu"


class Run:
    """A method compiled for one field, grid and kind of state. Calling it integrates, without reading anything back.

    `start` lets it begin anew: from another state, and with what has changed in the field.
    """

    def __init__(self, formula, field, z, times, settings):
        self.program = compile_schedule(formula, times, settings.path)
        self.field, self.times, self.settings = field, times, settings
        self.start(z, settings.index, settings.seed)
        field_at = getattr(field, "at", lambda time: field)
        fields = [field_at(time) for time in self.program.moments]
        self.moves = list(zip(fields, *self.program.numbers(z), self.program.instructions))
        self.blocks = (z[0].numel() + 3) // 4  # of the counter, that one normal takes

    def start(self, z, index=None, seed=0):
        """The next calls integrate from z, with the noise of samples `index` (B,), None being 0, 1, ..., of `seed`."""
        if hasattr(self.field, "prepare"):
            self.field.prepare(list(self.program.moments))
        self.z, self.seed, self.index = z, seed, None
        if self.program.noise is not None:
            self.index = (torch.arange(z.shape[0]) if index is None else index).to(z.device)

    def watched(self, on_step=None):
        """Call it, and raise RuntimeError if a velocity was not finite."""
        watched = _reading_is_free(self.z)
        solution = self(on_step, watched)
        if not watched:
            self.check_end(solution.z)
        return solution

    def check_end(self, z):
        """Raise RuntimeError if the state at the end is not finite, and say where it became so."""
        if not bool(z.isfinite().all()):
            self(watched=True)  # once more, to find out where
            self.check(z)

    def __call__(self, on_step=None, watched=False):
        z, seed, steps, nfe, guided_step = self.z, self.seed, 0, 0, GuidedSteps()
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
