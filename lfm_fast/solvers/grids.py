"""Time grids: the times a solver steps through, as Python floats (float64)."""

import torch

LFM_LAST_TIME = 1e-5
_LARGEST_SHIFT = 1e6  # far beyond, neighbouring times are one number


def time_grid(kind, num_steps, t_start=1.0, t_end=0.0, limits=(0.0, 1.0)):
    """The times from t_start to t_end, N + 1 of them for N steps.

    kind: what stands between the ends:
        None or "uniform": equidistant times;
        "lfm": the grid of LFM, N points and so N - 1 steps, over [1, 1e-5] (both ends raised to 1e-5 at least);
        ("shift", s): s u / (1 + (s - 1) u) of equidistant u, denser near noise for s > 1 (arXiv 2403.03206, eq. 23);
        a 1-D tensor (or list) of strictly monotone times, which replace num_steps and the ends.
    num_steps: N. limits: (t_min, t_max) of the path; an end outside is moved there.
    Returns: list of floats, strictly monotone.
    Raises ValueError for anything else, in one sentence.

    >>> time_grid("uniform", 4)
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> len(time_grid("lfm", 50)), time_grid("lfm", 50)[-1]
    (50, 1e-05)
    """
    low, high = limits
    if isinstance(kind, torch.Tensor) or (isinstance(kind, (list, tuple)) and not (kind and isinstance(kind[0], str))):
        times = [_clamp(t, low, high) for t in _given(kind, t_start, t_end)]
        if len(set(times)) < len(times):
            raise ValueError(f"time_grid has more than one time outside [{low:g}, {high:g}], the times of the path.")
        return times
    if isinstance(kind, str) and kind == "lfm":
        low, num_steps = max(low, LFM_LAST_TIME), num_steps - 1
        if num_steps < 1:
            raise ValueError("time_grid='lfm' makes num_steps - 1 steps; num_steps is 1, give 2 or more.")
    t_start, t_end = _clamp(t_start, low, high), _clamp(t_end, low, high)
    if t_start == t_end:
        raise ValueError(f"t_start and t_end are both {t_start:g} within [{low:g}, {high:g}]: nothing to integrate.")
    if kind is None or (isinstance(kind, str) and kind in ("uniform", "lfm")):
        return _equidistant(t_start, t_end, num_steps)
    if isinstance(kind, (list, tuple)) and len(kind) == 2 and kind[0] == "shift":
        return _shifted(kind[1], t_start, t_end, num_steps)
    raise ValueError(f"time_grid is {kind!r}, expected 'uniform', 'lfm', ('shift', s) or a 1-D tensor of times.")


def _clamp(t, low, high):
    return float(min(max(t, low), high))


def _equidistant(t_start, t_end, num_steps):
    # weighted so that (10 - k) / 10 comes out as the literal 0.1, 0.2, ... that an interval's ends are written as
    return [(t_start * (num_steps - k) + t_end * k) / num_steps for k in range(num_steps)] + [t_end]


def _shifted(shift, t_start, t_end, num_steps):
    if not is_number(shift) or not 1 / _LARGEST_SHIFT <= shift <= _LARGEST_SHIFT:
        raise ValueError(f"time_grid=('shift', {shift!r}): the shift has to be a positive number, from 1e-6 to 1e6.")
    first, last = (t / (shift - (shift - 1) * t) for t in (t_start, t_end))  # the inverse, so that the ends stay
    middle = [shift * u / (1 + (shift - 1) * u) for u in _equidistant(first, last, num_steps)[1:-1]]
    return [t_start, *middle, t_end]


def _given(times, t_start, t_end):
    try:
        # as they are, and not as torch.as_tensor would make them: [True, 0.5] and [1j, 0] are not to become times
        parts = times if isinstance(times, (list, tuple)) else [times]
        dtypes = [torch.as_tensor(part).dtype for part in parts]
        real = not any(dtype == torch.bool or dtype.is_complex for dtype in dtypes)
        times = torch.as_tensor(times, dtype=torch.float64).detach().cpu() if real else None
    except (TypeError, ValueError, RuntimeError):
        raise ValueError("time_grid holds something that is no number, expected a 1-D tensor of times.") from None
    if times is None:
        raise ValueError("time_grid holds bool or complex values, expected real numbers in [0, 1].")
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"time_grid is a tensor {tuple(times.shape)}, expected a 1-D one of at least two times.")
    steps = times.diff()
    if not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise ValueError("time_grid has to be strictly monotone; its times repeat, turn round or are not numbers.")
    times = times.tolist()
    if min(times) < 0.0 or max(times) > 1.0:
        raise ValueError(f"time_grid runs from {times[0]:g} to {times[-1]:g}, expected times in [0, 1].")
    for name, came, default, of_grid in (("t_start", t_start, 1.0, times[0]), ("t_end", t_end, 0.0, times[-1])):
        if came != default and abs(came - of_grid) > 1e-6:  # a float32 grid holds 0.3 to 1e-8
            raise ValueError(
                f"{name} is {came:g}, time_grid has {of_grid:g} there; leave {name} out or make them agree."
            )
    return times


def is_number(value):
    """Whether a Python number that is no bool was given."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
