"""Time grids: the times a solver steps through, as Python floats (float64)."""

import json
import math
from itertools import pairwise
from pathlib import Path

import torch

LFM_LAST_TIME = 1e-5
_SMALLEST_STEP = 1e-6
_LARGEST_SHIFT = 1e6  # far beyond, neighbouring times are one number
# of sigma / alpha, and its exponent: arXiv 2206.00364, table 1; beyond some hundred the spacing is geometric
_KARRAS_LOW, _KARRAS_HIGH, _KARRAS_RHO, _LARGEST_RHO = 0.002, 80.0, 7.0, 1000.0
# how many numbers stand after each name
_NUMBERS = {"uniform": (0,), "lfm": (0,), "quadratic": (0,), "karras": (0, 1), "shift": (1,), "step": (1,)}
_NUMBERS |= {"logit": (0, 1)}
_LOGIT, _LEAST_LOGIT, _LARGEST_LOGIT = 0.1, 1e-3, 1e3  # beyond, one step is nearly all, or the grid is uniform


def time_grid(kind, num_steps, t_start=1.0, t_end=0.0, path=None):
    """The times from t_start to t_end, N + 1 of them for N steps.

    kind: what stands between the ends, from the noisier end s to the cleaner end e (either may be the start):
        None or "uniform": equidistant times;
        "lfm": the grid of LFM, N points and so N - 1 steps, over [1, 1e-5] (both ends raised to 1e-5 at least);
        ("shift", s): s u / (1 + (s - 1) u) of equidistant u, denser near noise for s > 1 (arXiv 2403.03206, eq. 23);
        ("step", h): steps of h from the start, and a shorter last one, whatever num_steps (torchdiffeq's step_size);
        "quadratic": (sqrt(s) + i/N (sqrt(e) - sqrt(s)))^2, denser near data (arXiv 2010.02502, appendix D.2);
        "logit" or ("logit", a): equal steps of log((t + a) / (1 - t + a)), a = 0.1 unless given, denser near both ends;
        "karras" or ("karras", rho): the noise per data r = sigma(t) / alpha(t) of the path is
        (r_s^(1/rho) + i/M (r_e^(1/rho) - r_s^(1/rho)))^rho, rho = 7 unless given, much denser near data
        (arXiv 2206.00364, eq. 5); there r is at most 80 and at least 0.002, and as in the paper a last step (M = N - 1)
        leads from r = 0.002 to a cleaner end;
        a 1-D tensor (or list) of strictly monotone times, which replace num_steps and the ends;
        the name of a .json file with such times, as lfm_fast.tune_grid writes it: {"times": [1.0, ..., 0.0]}.
    num_steps: N. path: its t_min and t_max, to which an end outside is moved, and for "karras" alpha and sigma (see
    lfm_fast.paths); None: [0, 1].
    Returns: list of floats, strictly monotone.
    Raises ValueError for anything else, in one sentence.

    >>> time_grid("uniform", 4)
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> time_grid("quadratic", 4)
    [1.0, 0.5625, 0.25, 0.0625, 0.0]
    >>> len(time_grid("lfm", 50)), time_grid("lfm", 50)[-1]
    (50, 1e-05)
    """
    low, high = (0.0, 1.0) if path is None else (path.t_min, path.t_max)
    if is_table(kind):
        return _table(kind, t_start, t_end, low, high)
    name, *arguments = _words(kind)
    if name == "lfm":
        low, num_steps = max(low, LFM_LAST_TIME), num_steps - 1
        if num_steps < 1:
            raise ValueError("time_grid='lfm' makes num_steps - 1 steps; num_steps is 1, give 2 or more.")
    t_start, t_end = _clamp(t_start, low, high), _clamp(t_end, low, high)
    if t_start == t_end:
        raise ValueError(f"t_start and t_end are both {t_start:g} within [{low:g}, {high:g}]: nothing to integrate.")
    if name in ("uniform", "lfm"):
        return _equidistant(t_start, t_end, num_steps)
    if name == "step":
        return _of_step(*arguments, t_start, t_end)
    noisy, clean = max(t_start, t_end), min(t_start, t_end)
    if name == "shift":
        times = _shifted(*arguments, noisy, clean, num_steps)
    elif name == "logit":
        times = _logit(*(arguments or [_LOGIT]), noisy, clean, num_steps)
    elif name == "quadratic":
        times = [noisy, *(u * u for u in _equidistant(noisy**0.5, clean**0.5, num_steps)[1:-1]), clean]
    else:
        times = _karras(*(arguments or [_KARRAS_RHO]), noisy, clean, num_steps, path)
    return times if t_start > t_end else times[::-1]


def is_table(kind):
    """Whether a time_grid holds its times, or names a file that does, so that num_steps has no say."""
    if isinstance(kind, str):
        return kind.endswith(".json")
    return isinstance(kind, (torch.Tensor, Path)) or (isinstance(kind, (list, tuple)) and not _named(kind))


def from_text(text):
    """The time_grid that a command line names: "uniform", "shift:3", "karras:7", ... or a .json file.

    >>> from_text("shift:3"), from_text("quadratic")
    (('shift', 3.0), 'quadratic')
    """
    name, colon, number = text.partition(":")
    if not colon or text.endswith(".json"):
        return text
    try:
        return (name, float(number))
    except ValueError:
        raise ValueError(f"time_grid is {text!r}, expected a number after {name}:, as in shift:3.") from None


def read_table(file):
    """The times in a .json file. Raises ValueError, naming it, where there are none."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"time_grid: {file} cannot be read as JSON ({type(error).__name__}).") from None
    times = content.get("times") if isinstance(content, dict) else None
    if not isinstance(times, list):
        raise ValueError(f'time_grid: {file} holds no times, expected {{"times": [1.0, ..., 0.0]}}.')
    return times


def _named(kind):
    return isinstance(kind, (list, tuple)) and len(kind) > 0 and isinstance(kind[0], str)


def _words(kind):
    """(name, its numbers ...) of a grid that is made."""
    words = ("uniform",) if kind is None else (kind,) if isinstance(kind, str) else kind
    if not _named(words) or len(words) - 1 not in _NUMBERS.get(words[0], ()):
        raise ValueError(
            f"time_grid is {kind!r}, expected 'uniform', 'lfm', 'quadratic', 'logit', ('logit', a), 'karras', "
            "('karras', rho), ('shift', s), ('step', h), a 1-D tensor of times or a .json file of them."
        )
    return words


def _table(kind, t_start, t_end, low, high):
    given = read_table(kind) if isinstance(kind, (str, Path)) else kind
    times = [_clamp(t, low, high) for t in _given(given, t_start, t_end)]
    if len(set(times)) < len(times):
        raise ValueError(f"time_grid has more than one time outside [{low:g}, {high:g}], the times of the path.")
    return times


def _clamp(t, low, high):
    return float(min(max(t, low), high))


def _equidistant(t_start, t_end, num_steps):
    # weighted so that (10 - k) / 10 comes out as the literal 0.1, 0.2, ... that an interval's ends are written as
    return [(t_start * (num_steps - k) + t_end * k) / num_steps for k in range(num_steps)] + [t_end]


def _of_step(step, t_start, t_end):
    if not is_number(step) or not _SMALLEST_STEP <= step <= 1.0:
        raise ValueError(f"time_grid=('step', {step!r}): a step is a number from {_SMALLEST_STEP:g} to 1.")
    span = t_end - t_start
    count = math.ceil(abs(span) / step - _SMALLEST_STEP)  # a remainder of mere rounding is no step
    return [t_start + k * math.copysign(step, span) for k in range(max(count, 1))] + [t_end]


def _shifted(shift, t_start, t_end, num_steps):
    if not is_number(shift) or not 1 / _LARGEST_SHIFT <= shift <= _LARGEST_SHIFT:
        raise ValueError(f"time_grid=('shift', {shift!r}): the shift has to be a positive number, from 1e-6 to 1e6.")
    first, last = (t / (shift - (shift - 1) * t) for t in (t_start, t_end))  # the inverse, so that the ends stay
    middle = [shift * u / (1 + (shift - 1) * u) for u in _equidistant(first, last, num_steps)[1:-1]]
    return [t_start, *middle, t_end]


def _logit(width, t_start, t_end, num_steps):
    if not is_number(width) or not _LEAST_LOGIT <= width <= _LARGEST_LOGIT:
        raise ValueError(
            f"time_grid=('logit', {width!r}): a has to be a number from {_LEAST_LOGIT:g} to {_LARGEST_LOGIT:g}."
        )
    first, last = (math.log((t + width) / (1 - t + width)) for t in (t_start, t_end))
    ratios = [math.exp(u) for u in _equidistant(first, last, num_steps)[1:-1]]
    return [t_start, *((ratio * (1 + width) - width) / (1 + ratio) for ratio in ratios), t_end]


def _karras(rho, noisy, clean, num_steps, path):
    if not is_number(rho) or not 1.0 <= rho <= _LARGEST_RHO:
        raise ValueError(f"time_grid=('karras', {rho!r}): rho has to be a number from 1 to {_LARGEST_RHO:g}.")
    if path is None:
        raise ValueError("time_grid='karras' needs a path, whose sigma / alpha it spaces.")
    highest, lowest = (min(max(_ratio(path, t), _KARRAS_LOW), _KARRAS_HIGH) for t in (noisy, clean))
    if lowest >= highest:
        raise ValueError(
            f"time_grid='karras' spaces sigma / alpha within [{_KARRAS_LOW:g}, {_KARRAS_HIGH:g}], which t from "
            f"{noisy:g} to {clean:g} does not cross; take another grid there."
        )
    beyond = _ratio(path, clean) < lowest and num_steps > 1  # then the lowest ratio is a time of its own
    roots = _equidistant(highest ** (1 / rho), lowest ** (1 / rho), num_steps - beyond)
    inner = [_time_of_ratio(path, root**rho, noisy, clean) for root in roots[1:num_steps]]
    times = [noisy, *inner, clean]
    if any(after >= before for before, after in pairwise(times)):
        raise ValueError(f"time_grid='karras' with {num_steps} steps has times that are one number; take fewer steps.")
    return times


def _ratio(path, t):
    t = torch.tensor(t, dtype=torch.float64)
    return float(path.sigma(t) / path.alpha(t))


def _time_of_ratio(path, ratio, high, low):
    """The t in [low, high] of this sigma / alpha, which rises with t on every path: bisected to the last bit."""
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _ratio(path, middle) < ratio else (low, middle)
    return high


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
