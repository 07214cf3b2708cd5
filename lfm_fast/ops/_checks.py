"""Checks of arguments, shared by the rows: each raises ValueError with one sentence, before any work is done."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

STATE = (torch.float32, torch.float64)
VELOCITY = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (torch.int64,)
_WORDS = 1 << 32
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float))


def check_tensor(name: str, value, dtypes: Sequence[torch.dtype]) -> None:
    """A strided tensor of one of these dtypes."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: pass a torch.Tensor.")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} has layout {value.layout}: pass a dense tensor ({name}.to_dense()).")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} is {str(value.dtype).removeprefix('torch.')}, expected {allowed}: convert it first.")


def check_writable(name: str, value: Tensor) -> None:
    """A tensor that an op may change in place: no element of it is another's memory too."""
    shared = not torch.compiler.is_compiling() and value.is_neg()
    reach = 1  # how many elements on the dimensions with smaller strides go
    if not value.is_contiguous() and value.numel():
        for stride, size in sorted((stride, size) for size, stride in zip(value.shape, value.stride()) if size != 1):
            shared = shared or stride < reach
            reach += stride * (size - 1)
    if shared:
        raise ValueError(f"{name} is changed in place but is no memory of its own: pass a copy ({name}.clone()).")


def check_apart(lists: dict[str, list[Tensor]], read: str) -> None:
    """No two of these start at the same memory, but for the ones of the list that is only `read`: an op that changes
    one would change the other as well."""
    if torch.compiler.is_compiling():
        return
    seen: dict[int, str] = {}
    for name in [*(name for name in lists if name != read), read]:
        for x in lists[name]:
            if isinstance(x, FakeTensor) or not x.numel() or not (address := x.data_ptr()):
                continue  # tensors without memory
            if address in seen:
                other = "another" if seen[address] == name else f"one of {seen[address]}"
                raise ValueError(f"a tensor of {name} is {other} as well: each needs memory of its own.")
            if name != read:
                seen[address] = name


def check_state(name: str, value, dtypes: Sequence[torch.dtype] = STATE) -> None:
    """A tensor with samples along its first dimension."""
    check_tensor(name, value, dtypes)
    if value.dim() == 0:
        raise ValueError(f"{name} has no dimensions, expected (B, ...): add one with {name}[None].")


def check_like(name: str, value, other_name: str, other: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """A tensor of another's shape and device; float64 only beside float64."""
    check_tensor(name, value, dtypes)
    if value.shape != other.shape:
        raise ValueError(f"{name} is {tuple(value.shape)} but {other_name} is {tuple(other.shape)}: shapes must agree.")
    _check_beside(name, value, other_name, other)


def check_per_sample(name: str, value, shape: tuple, other_name: str, other: Tensor, dtypes=STATE) -> None:
    """A tensor of per-sample numbers of exactly this shape, on the other's device; float64 only beside float64."""
    check_tensor(name, value, dtypes)
    if tuple(value.shape) != shape:
        raise ValueError(
            f"{name} is {tuple(value.shape)}, expected {shape} for {other_name} of shape {tuple(other.shape)}: "
            "one value per sample (expand a common one)."
        )
    _check_beside(name, value, other_name, other)


def check_per_channel(name: str, value, channels: int, other_name: str, other: Tensor, dtypes=VELOCITY) -> None:
    """A vector of one number per channel, common to all samples, on the other's device; float64 only beside float64."""
    check_tensor(name, value, dtypes)
    if tuple(value.shape) != (channels,):
        raise ValueError(f"{name} is {tuple(value.shape)}, expected ({channels},): one value per channel.")
    _check_beside(name, value, other_name, other)


def _check_beside(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device} but {other_name} is on {other.device}: move one of them.")
    if value.dtype is torch.float64 and other.dtype is not torch.float64:
        raise ValueError(f"{name} is float64 but {other_name} is not: pass {name}.float(), or {other_name}.double().")


def check_exactly_one(**values) -> None:
    given = [name for name, value in values.items() if value is not None]
    if len(given) != 1:
        came = " and ".join(given) if given else "neither"
        raise ValueError(f"Pass exactly one of {' and '.join(values)}; {came} came.")


def check_together(**values) -> None:
    missing = [name for name, value in values.items() if value is None]
    if missing and len(missing) < len(values):
        raise ValueError(f"{' and '.join(values)} go together: {' and '.join(missing)} is missing.")


def check_tolerance(**values) -> None:
    for name, value in values.items():
        check_number(name, value)
        if not value >= 0:
            raise ValueError(f"{name} is {value}, expected a number >= 0.")


def check_number(name: str, value) -> None:
    """A number that a C double can hold."""
    if not isinstance(value, (int, float)):
        raise ValueError(f"{name} is a {type(value).__name__}: pass a number.")
    if isinstance(value, int) and value.bit_length() > 1023:
        raise ValueError(f"{name} is an int of {value.bit_length()} bits, more than a float can hold: pass inf.")


def check_flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is a {type(value).__name__}: pass True or False.")


def check_counter(numel: int, seed, stream=0, offset=0) -> None:
    """Numbers of the counter that the generator can hold."""
    for name, value in (("seed", seed), ("stream", stream), ("offset", offset)):
        if not isinstance(value, int):
            raise ValueError(f"{name} is a {type(value).__name__}: pass an int.")
    if not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed is {seed}, expected a signed 64-bit number: take it modulo 2**63.")
    if not 0 <= stream < _WORDS:
        raise ValueError(f"stream is {stream}, expected 0 <= stream < 2**32.")
    if offset < 0 or offset + (numel + 3) // 4 > _WORDS:
        raise ValueError(f"offset {offset} and {numel} numbers leave the 2**32 blocks that one sample has.")


def numel_per_sample(z: Tensor) -> int:
    """How many elements one sample has; also right where B is 0."""
    count = 1
    for size in z.shape[1:]:
        count = count * size
    return count


def flat(x: Tensor) -> Tensor:
    """(B, ...) -> (B, N), also where B or N is 0."""
    return x.reshape(x.shape[0], numel_per_sample(x))


def needs_gradient(*args) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def refuse_float64(*tensors: Tensor | None) -> str | None:
    """The reason of the float32 kernels when one of these is float64, else None."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return "it computes in float32, and an argument is float64"
    return None


def unwatched(args: tuple) -> bool:
    """Whether nobody but an op's kernel would see a call of it: no subclass of Tensor, which may have its own idea of
    every operator, no mode that is told of each, and no tracing."""
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    for value in args:
        if type(value) not in _PLAIN and not (type(value) is list and _PLAIN.issuperset(map(type, value))):
            return False
    return True
