"""What is timed. A workload is built from a specification of plain values, so that another process builds the same.

`call` is one run of it with whatever backends are forced around; `compile` puts torch.compile in place; `result` gives
the tensors that `truth` has in float64. Numbers are drawn, never zeros: a processor may be faster on zeros.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.ceilings import LARGE, working_set_bytes
from benchmarks.names import AGAIN, COPY, EAGER, FAST, ONEDNN, REFERENCE
from benchmarks.plain import PLAIN
from lfm_fast import ops  # noqa: F401  (its import registers the rows)
from lfm_fast.ops import _registry
from lfm_fast.ops._cases import numbers
from lfm_fast.ops.packed_linear import unpack
from lfm_fast.ops.philox_normal import philox_words

MOST_FLOPS_PER_BYTE = 20  # of an op for which moving memory is the yardstick


@dataclass
class Contender:
    """Who is timed: what one turn calls, on which backend (see `plain.forced`), and the tensors that tell its error.

    result None: nothing of it compares. peak: a call that holds as much memory and is shorter.
    """

    call: Callable
    result: Callable[[], list[Tensor]] | None = None
    backend: str | None = None
    peak: Callable | None = None
    how: str = ""


class Workload:
    """`moved` bytes that have to be read and written, and `flops`, of one call; `images` that it serves."""

    precision = "float32"
    moved: int | None = None
    flops: int | None = None
    images: int | None = None
    note = ""
    rounds: int | None = None  # how many there are whatever the time, with no call before them to warm up
    measures_memory = True  # by PyTorch's profiler, so within this process
    profiled: tuple[str, ...] = ()  # contenders whose operators' shares of the time are kept

    def call(self):
        raise AssertionError("every workload says what it runs")

    def compile(self) -> None:
        raise AssertionError("this workload has no compiled contender")

    def result(self) -> list[Tensor]:
        return tensors_of(self.call())

    def truth(self) -> list[Tensor] | None:
        """The result in float64, or None where there is none."""
        return None

    def truth_of(self, name: str) -> list[Tensor] | None:
        """That of a contender, computed once."""
        if not hasattr(self, "_truth"):
            self._truth = self.truth()
        return self._truth

    def contenders(self) -> dict[str, Contender]:
        """Who runs in this process, the fast path first."""
        return {
            FAST: Contender(self.call, self.result),
            REFERENCE: Contender(self.call, self.result, "reference"),
            AGAIN: Contender(self.call),
            **{name: Contender(call, result) for name, (call, result) in self.others().items()},
        }

    def others(self) -> dict[str, tuple[Callable, Callable | None]]:
        """Further contenders: name -> (call, what gives its result or None where none compares)."""
        return {}

    def compiled(self, name: str) -> Contender:
        """A contender that Inductor compiled, in whatever process this is called."""
        self.compile()
        return Contender(self.call, self.result)

    def facts(self, name: str, seconds: float) -> dict:
        """What else to record of a contender whose median time is `seconds`."""
        return {}

    def largest_error(self, errors: list[float]) -> float:
        """The largest relative error that is a rounding and no mistake, given those of all contenders."""
        return LARGEST_ERROR[self.precision]


# Roundings grow to 1e-6 in float32 and to 1e-2 in bfloat16 (8 bits: 4e-3 each) on the way through a network and back;
# a wrong kernel, such as one sample's modulation applied to the batch, is off by 1e-1 and more.
LARGEST_ERROR = {"float32": 1e-5, "bfloat16": 3e-2}


class OpWorkload(Workload):
    """One row of the op table at one of its sizes.

    Inputs of a megabyte or more are held in as many copies as exceed the cache, and each call takes the next.
    """

    compile_how: dict = {}  # further arguments of torch.compile

    def __init__(self, row: str, size: dict):
        self.row, self.device = _registry.row(row), size.get("device", "cpu")
        args = self.row.bind(**self.row.arguments(**size))
        self.moved, self.flops = self.row.cost(*args)
        dtypes = {x.dtype for x in _tensors_in(args) if x.is_floating_point()}
        self.precision = "bfloat16" if torch.bfloat16 in dtypes else "float32"
        held = sum(x.numel() * x.element_size() for x in _tensors_in(args))
        copies = math.ceil(working_set_bytes(self.device) / held) if held >= LARGE else 1
        self.note = "inputs from memory" if copies > 1 else "inputs in the cache"
        self.copies = copies
        self.sets = itertools.cycle([args, *(_map_tensors(torch.clone, args) for _ in range(copies - 1))])
        self.function = self.row

    def call(self):
        return self.function(*next(self.sets))

    def compile(self) -> None:
        self.function = torch.compile(self.row.reference, fullgraph=True, dynamic=False, **self.compile_how)

    def truth(self) -> list[Tensor]:
        args = next(self.sets)  # all copies hold the same numbers
        if self.row.name == "philox_normal":
            return [exact_normals(*args)]
        wide = _map_tensors(lambda x: x.double() if x.is_floating_point() else x, args)
        return tensors_of(self.row.reference(*wide))

    def others(self):
        return {**self._copying(), **self._plain()}

    def _copying(self) -> dict:
        """The yardstick of an op that moves memory: a copy into memory held already, as the op's outputs are."""
        if self.moved is None or self.flops > MOST_FLOPS_PER_BYTE * self.moved:
            return {}
        half = (max(self.moved // 8, 1),)
        sources = itertools.cycle([torch.full(half, 1.25, device=self.device) for _ in range(self.copies)])
        return {COPY: (lambda: next(sources).clone(), None)}

    def _plain(self) -> dict:
        if self.row.name == "philox_normal":
            index, numel = next(self.sets)[:2]
            generator = torch.Generator(self.device).manual_seed(0)
            # no sample number goes in: the same noise for any batch size is what it does not give
            how = {"generator": generator, "device": self.device}
            return {"torch.randn": (lambda: torch.randn(len(index), numel, **how), None)}
        if self.row.name == "packed_linear":
            products = itertools.cycle([_by_onednn(*next(self.sets)) for _ in range(self.copies)])
            return {ONEDNN: (lambda: next(products)(), lambda: [next(products)()])}
        if self.row.name not in PLAIN:
            return {}
        write = PLAIN[self.row.name]
        return {EAGER: (lambda: write(*next(self.sets)), lambda: tensors_of(write(*next(self.sets))))}


class ForwardBackward(OpWorkload):
    """A row and its gradient in every input that has one, as a training step calls them.

    The compiled contender is Inductor's forward and backward of the reference.
    """

    def __init__(self, row: str, size: dict):
        super().__init__(row, size)
        if self.row.composite:  # its gradient is PyTorch's own, whose cost depends on what it kept
            self.moved = self.flops = None
        else:
            backward = _registry.row(f"{row}_backward")
            moved, flops = backward.cost(*backward.bind(**backward.arguments(**size)))
            self.moved, self.flops = self.moved + moved, self.flops + flops
        self.sets = itertools.cycle([self._requiring_grad(next(self.sets)) for _ in range(self.copies)])
        results = tensors_of(self.row(*next(self.sets)))
        self.positions = [i for i, result in enumerate(results) if result.requires_grad]
        wanted = (results[i] for i in self.positions)
        self.gradients = [numbers(r.shape, 9 + k, device=r.device, dtype=r.dtype) for k, r in enumerate(wanted)]

    def call(self):
        return self._gradients(next(self.sets), self.function, self.gradients)

    def truth(self) -> list[Tensor]:
        wide = _map_tensors(lambda x: x.detach().double() if x.is_floating_point() else x, next(self.sets))
        return self._gradients(self._requiring_grad(wide), self.row.reference, [g.double() for g in self.gradients])

    def _plain(self) -> dict:
        if self.row.name not in PLAIN:
            return {}
        write = PLAIN[self.row.name]
        return {EAGER: (lambda: self._gradients(next(self.sets), write, self.gradients), self._eager)}

    def _eager(self) -> list[Tensor]:
        return self._gradients(next(self.sets), PLAIN[self.row.name], self.gradients)

    def _gradients(self, args, function, gradients) -> list[Tensor]:
        results = tensors_of(function(*args))
        wanted = [x for x in _tensors_in(args) if x.requires_grad]
        return list(torch.autograd.grad([results[i] for i in self.positions], wanted, gradients))

    def _requiring_grad(self, args):
        for name, value in zip(self.row.argument_names, args):
            if isinstance(value, Tensor) and value.is_floating_point() and name not in self.row.not_differentiable:
                value.requires_grad_()
        return args


def _by_onednn(x, weight, bias, out_features, gelu) -> Callable:
    """The layer on weights that oneDNN has packed for itself, and its own GELU: what Inductor calls after freezing."""
    mkldnn, plain = torch.ops.mkldnn, unpack(weight, out_features, x.shape[-1]).contiguous()
    packed = mkldnn._reorder_linear_weight(plain, x.numel() // x.shape[-1])
    then = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return lambda: mkldnn._linear_pointwise(x, packed, bias, *then)


def exact_normals(index: Tensor, numel: int, seed: int, stream: int, offset: int) -> Tensor:
    """Box-Muller in float64 of the words that philox_normal draws: (B, numel)."""
    words = philox_words(index, math.ceil(numel / 4), seed, stream, offset).double()
    radius = ((words[..., 0::2] + 1) * 2.0**-32).log().mul(-2).sqrt()  # (B, blocks, 2)
    angle = words[..., 1::2] * (2 * math.pi * 2.0**-32)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :numel]


def tensors_of(result) -> list[Tensor]:
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if x.numel()]


def relative_error(got: list[Tensor], want: list[Tensor]) -> float:
    """The worst, over the tensors, of |got - want| / |want| in the Euclidean norm; NaN where one is."""
    assert [x.shape for x in got] == [x.shape for x in want]
    errors = [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want)]
    return math.nan if any(map(math.isnan, errors)) else max(errors)  # max drops a NaN that is not the first


def _tensors_in(args) -> list[Tensor]:
    return [x for a in args for x in (a if isinstance(a, list) else [a]) if isinstance(x, Tensor)]


def _map_tensors(function, args) -> tuple:
    return tuple(
        [function(x) for x in a] if isinstance(a, list) else function(a) if isinstance(a, Tensor) else a for a in args
    )
