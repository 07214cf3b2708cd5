"""The executor of every method of fixed steps: a move is one evaluation of the field and one ops.guided_step.

Nothing in the loop waits for a device, and nothing but the field allocates in Python: times, weights and places are
made beforehand.
"""

import math

import torch

from lfm_fast import ops
from lfm_fast.solvers.schedule import compile_moves
from lfm_fast.solvers.solution import Solution


def integrate(formula, field, z, times, settings):
    """dz/dt = field(t, z) over the given times by a formula (see lfm_fast.solvers.schedule).

    field: see lfm_fast.solvers. z (B, ...) float32 or float64, the state at times[0]. times: floats, in either
    direction. settings: a Settings. Returns a Solution. Raises RuntimeError for a velocity that is not finite.
    """
    run = Run(formula, field, z, times, settings)
    # on the CPU the state is looked at after every step, which waits for nothing; elsewhere once, at the end
    watched = z.device.type == "cpu"
    solution = run(settings.on_step, watched)
    if not watched and not bool(solution.z.isfinite().all()):
        run(watched=True)
        run.check(solution.z, len(times) - 1)  # the second time all went well: it is known where, not when
    return solution


class Run:
    """A method compiled for one field, state and grid. Calling it integrates, without reading anything back."""

    def __init__(self, formula, field, z, times, settings):
        moves = formula.schedule(times, settings.path)
        if hasattr(field, "prepare"):
            field.prepare([move.time for move in moves])
        field_at = getattr(field, "at", lambda time: field)
        self.fields = [field_at(move.time) for move in moves]
        self.z, self.times, self.settings = z, times, settings
        self.instructions, self.num_places = compile_moves(moves, z)
        self.index = settings.index
        if self.index is None and any(move.noise for move in moves):
            self.index = torch.arange(z.shape[0])
        if self.index is not None:
            self.index = self.index.to(z.device)

    def __call__(self, on_step=None, watched=False):
        z, seed, index, steps, nfe = self.z, self.settings.seed, self.index, 0, 0
        states = [z] if self.settings.trajectory else None
        store = [None] * self.num_places
        store[0] = z
        for evaluate, move in zip(self.fields, self.instructions):
            t, base, stored, weights, noise_scale, offset, keep, keep_point, arrives = move
            velocity, unconditional, scale = evaluate(t, z)
            z, blended, _ = ops.guided_step(
                store[base],
                velocity,
                unconditional,
                scale,
                [store[place] for place in stored],
                weights,
                noise_scale=noise_scale,
                index=None if noise_scale is None else index,
                seed=seed,
                offset=offset,
                keep=keep is not None,
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

    def check(self, z, step):
        """Raise RuntimeError if z, which step number `step` made, is not finite."""
        bad = (~z.isfinite().flatten(1).all(1)).nonzero().flatten().tolist()
        if not bad:
            return  # the sum overflowed, no element did
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise RuntimeError(
            f"The velocity is not finite, or too large, in step {step} of {len(self.times) - 1}, from "
            f"t = {self.times[step - 1]:g} to {self.times[step]:g}, in sample {bad[0]}{more} of the batch."
        )
