"""The backends of the row `attention`, and how one of them is chosen.

Each is a composition of differentiable operators, so that the gradient is the backend's own: PyTorch pairs every fused
forward with its backward, which gets the log-sum-exp of each row instead of the (T_q, T_k) weights; so do we. The
aten operators are called by name and not by way of torch.nn.attention.sdpa_kernel, whose switches are global to the
process.
"""

import functools
import importlib
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from lfm_fast import _library
from lfm_fast.ops import _measured
from lfm_fast.ops._attention_gradient import default_scale, differentiable, why_not_cpp, why_not_empty
from lfm_fast.ops._checks import needs_gradient
from lfm_fast.ops._registry import NEVER_ON_GPU, Backend, Op

_aten = torch.ops.aten
_TABLE = "attention"
# Above this the (T_q, T_k) weights of all heads are no contender, only a way to run out of memory
_MOST_WEIGHTS = 1 << 28
# Below this PyTorch's CPU kernel (2.13) makes 0 of a row of weights that are all NaN: no full vector, no NaN
_FEWEST_KEYS = 16
# PyTorch's fused CPU backward in 16 bits is the slower way up to here, see `_default`
_SHORT = 512


def _sdpa(q, k, v, scale=None):
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def two_products(q, k, v, scale=None):
    """With the weights (B, heads, T_q, T_k) in memory, in the arguments' dtype; PyTorch's softmax sums in float32."""
    weights = torch.softmax((q * default_scale(q, scale)) @ k.transpose(-2, -1), dim=-1)
    return weights.to(v.dtype) @ v  # autocast makes float32 of a softmax


def _padded_to_eights(run):
    """The fused CUDA kernels want head sizes that are multiples of 8. Zeros add nothing to a product."""

    def padded(q, k, v, scale=None):
        width, scale = q.shape[-1], default_scale(q, scale)
        missing = -width % 8
        if not missing:
            return run(q, k, v, scale)
        return run(*(F.pad(x, (0, missing)) for x in (q, k, v)), scale)[..., :width]

    return padded


@_padded_to_eights
def _flash(q, k, v, scale):
    return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[0]


@_padded_to_eights
def _efficient(q, k, v, scale):
    with_sums = needs_gradient(q, k, v)
    return _aten._scaled_dot_product_efficient_attention(q, k, v, None, with_sums, 0.0, False, scale=scale)[0]


@_padded_to_eights
def _cudnn(q, k, v, scale):
    with_sums = needs_gradient(q, k, v)
    return _aten._scaled_dot_product_cudnn_attention(q, k, v, None, with_sums, 0.0, False, False, scale=scale)[0]


def _xformers(q, k, v, scale=None):
    tokens_first = (x.transpose(1, 2) for x in (q, k, v))  # what it calls (B, M, H, K)
    return _import_xformers().memory_efficient_attention(*tokens_first, scale=default_scale(q, scale)).transpose(1, 2)


@functools.cache
def _import_xformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of what of itself it cannot load
        return importlib.import_module("xformers.ops")


@functools.cache
def _xformers_available() -> str | None:
    """Asked only when a CUDA tensor came, since importing it takes seconds and prints."""
    try:
        _import_xformers()
    except ModuleNotFoundError:
        return "xformers is not installed (pip install xformers)"
    except Exception as error:  # whatever a broken binary package raises while it loads
        return f"xformers cannot be imported ({_first_line(error)})"
    return None


def _always() -> None:
    """Part of PyTorch."""


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def _why_not_sdpa(q, k, v, scale=None) -> str | None:
    empty = why_not_empty(q, k, v)
    if empty is None and q.device.type == "cpu" and k.shape[2] < _FEWEST_KEYS:
        return f"below {_FEWEST_KEYS} keys PyTorch's CPU kernel would turn a NaN in q into 0"
    if empty is None and q.device.type == "cpu" and any(map(_rows_overlap, (q, k, v))):
        return "of tokens that overlap in memory PyTorch's CPU kernel makes wrong numbers"
    return empty


def _rows_overlap(x: Tensor) -> bool:
    return x.shape[2] > 1 and x.stride(3) == 1 and 0 < x.stride(2) < x.shape[3]


def like_cpp(q, k, v, scale=None):
    """What the compiled kernel returns: the heads of a token side by side."""
    batch, heads, tokens, width = q.shape
    return q.new_empty(batch, tokens, heads, width).transpose(1, 2)


def _why_not_torch(can_use: str, dtypes: tuple[torch.dtype, ...]):
    """PyTorch's own check of one of its fused CUDA kernels."""

    def why_not(q, k, v, scale=None) -> str | None:
        empty = why_not_empty(q, k, v)
        if empty or q.device.type != "cuda":
            return empty
        if q.dtype not in dtypes:
            return f"it has no kernel for {str(q.dtype).removeprefix('torch.')}"
        missing = -q.shape[-1] % 8
        if missing:
            padded = [x.new_empty(*x.shape[:3], x.shape[3] + missing) for x in (q, k, v)]
            q, k, v = (x.requires_grad_(needs_gradient(y)) for x, y in zip(padded, (q, k, v)))
        params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, False)
        if not getattr(torch.backends.cuda, can_use)(params, False):
            return f"torch.backends.cuda.{can_use} says no to this device, shape or layout"
        return None

    return why_not


def _why_not_xformers(q, k, v, scale=None) -> str | None:
    empty = why_not_empty(q, k, v)
    if empty or q.device.type != "cuda":
        return empty
    if type(q) not in (Tensor, torch.nn.Parameter):
        return "it is called outside traced graphs only"
    try:
        fmha = _import_xformers().fmha
        inputs = fmha.Inputs(*(x.transpose(1, 2) for x in (q, k, v)), scale=default_scale(q, scale))
        kernels = [fmha.ALL_FW_OPS, *([fmha.ALL_BW_OPS] if needs_gradient(q, k, v) else [])]
        for kind in kernels:
            reasons = [kernel.not_supported_reasons(inputs) for kernel in kind]
            if all(reasons):
                return "none of its kernels takes this (" + "; ".join(str(r[0]).rstrip(".") for r in reasons[:3]) + ")"
    except Exception as error:  # another version's interface, or a missing CUDA runtime
        return f"xformers cannot say whether it takes this ({_first_line(error)})"
    return None


_HALF = (torch.bfloat16, torch.float16)
BACKENDS = (
    Backend(
        name="cpp",
        devices=("cpu",),
        why_not=why_not_cpp,
        available=_library.why_no_tiles,
        with_gradient=differentiable,
    ),
    # the fused kernel that PyTorch itself would take
    Backend(name="sdpa", devices=("cpu", "cuda"), why_not=_why_not_sdpa, available=_always, kernel=_sdpa),
    *(
        Backend(
            name=name,
            devices=("cuda",),
            why_not=_why_not_torch(f"can_use_{name}_attention", dtypes),
            available=_always,
            kernel=kernel,
            opt_in=NEVER_ON_GPU,
        )
        for name, kernel, dtypes in (
            ("flash", _flash, _HALF),
            ("cudnn", _cudnn, _HALF),
            ("efficient", _efficient, (*_HALF, torch.float32)),
        )
    ),
    Backend(
        name="xformers",
        devices=("cuda",),
        why_not=_why_not_xformers,
        available=_xformers_available,
        kernel=_xformers,
        opt_in=NEVER_ON_GPU,
    ),
    Backend(name="math", devices=("cpu", "cuda"), why_not=why_not_empty, available=_always, kernel=two_products),
)


def rank(row: Op, args: tuple) -> tuple[str, dict[str, str]]:
    """The backend to take, and why not the others that would serve: by what was measured, else by `_default`."""
    q, k, v, scale = args if len(args) == 4 else (*args, None)
    contenders = row.willing(args, forced=_measured.mode() == "always")
    if len(contenders) < 2:
        return (contenders or ["reference"])[0], {}
    if _more(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2], _MOST_WEIGHTS):
        contenders = [name for name in contenders if name != "math"]
    table, measuring = _measured.remembered(_TABLE), _measured.may_measure((q, k, v))
    key = _kind(q, k, v) if table or measuring else None
    times = table.get(key, {})
    if key and measuring and not times.keys() >= set(contenders):
        runs = {name: _trial(row, name, q, k, v, scale) for name in contenders}
        times = _measured.measure(_TABLE, key, runs, q.device)
    timed = {name: times[name] for name in contenders if isinstance(times.get(name), float)}
    failed = {name: times[name] for name in contenders if isinstance(times.get(name), str)}
    if not timed:
        return _default(contenders, q, k, v), failed
    best = min(timed, key=timed.get)
    ms = {name: f"{1e3 * seconds:.3g} ms" for name, seconds in timed.items()}
    slower = {name: f"{best} was measured to be faster, {ms[best]} against {ms[name]}" for name in timed}
    return best, slower | failed


def _more(count, limit: int) -> bool:
    """count > limit; no for a count that a graph holds open without bounds, such as of a batch of any size."""
    if isinstance(count, int):
        return count > limit
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # sympy, half a second

    return guard_or_false(count > limit)


def _default(contenders: list[str], q, k, v) -> str:
    """Without a measurement: the first, but for gradients of short bf16 sequences on a CPU without our kernel.

    There PyTorch's fused backward (2.13, AMX, one core) made forward and backward 110 against 31 ms at 64 tokens and 91
    against 61 ms at 256.
    """
    short = q.shape[2] <= _SHORT and k.shape[2] <= _SHORT
    slow_backward = q.device.type == "cpu" and q.dtype is torch.bfloat16 and needs_gradient(q, k, v)
    math = slow_backward and short and contenders[0] != "cpp" and "math" in contenders
    return "math" if math else contenders[0]


def _kind(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """The kind of call that shares a measurement, or None where the sizes are unknown."""
    heads, queries, keys = _bucket(q.shape[0], q.shape[1]), _bucket(q.shape[2]), _bucket(k.shape[2])
    if None in (heads, queries, keys):
        return None
    gradient = "forward and backward" if needs_gradient(q, k, v) else "forward"
    dtype = str(q.dtype).removeprefix("torch.")
    shape = f"{heads} heads, {queries} queries, {keys} keys of {int(q.shape[3])}"
    return f"torch {torch.__version__}, {_measured.device_name(q.device)}: {dtype}, {shape}, {gradient}"


def _bucket(*sizes) -> int | None:
    product = 1
    for size in sizes:
        size = _measured.bucket(size)
        if size is None:
            return None
        product *= size
    return product


def _trial(row: Op, name: str, q: Tensor, k: Tensor, v: Tensor, scale):
    """What is timed: a call like this one, with its backward pass where this one will have one. It must be right."""
    with_gradient = needs_gradient(q, k, v)
    leaves = [x.detach().requires_grad_(with_gradient) for x in (q, k, v)]
    checked = []

    def run():
        y = row.kernels[name](*leaves, scale)
        if with_gradient:
            torch.autograd.grad(y, leaves, torch.ones_like(y))
        if not checked:
            _assert_right(row, y, leaves, scale)
            checked.append(True)

    return run


def _assert_right(row: Op, y: Tensor, leaves: list[Tensor], scale) -> None:
    """One head against the reference. A kernel that is this far off is broken, not imprecise."""
    with torch.no_grad():
        q, k, v = (x.detach()[:1, :1] for x in leaves)
        off = (y[:1, :1].float() - row.reference(q, k, v, scale).float()).abs().max()
        if not off <= 0.05 * v.float().abs().max():
            raise RuntimeError(f"its result is off by {off.item():.3g}")
