"""The op registry: what a row of an op is, which of its backends runs, and why the others would not.

A row (`Op`) becomes one `torch.library` operator `lfm_fast::NAME`. Its kernel asks the row's backends, in order, for
the first of the tensors' device that has no reason to refuse, and falls back on the plain-PyTorch reference, which is
the fake (meta) kernel too. Compiled backends live in the namespace `lfm_fast_BACKEND` with the same schema, so that
the schema stands once, in the row.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch.autograd import forward_ad

from lfm_fast import _library
from lfm_fast.ops._checks import needs_gradient, unwatched

BACKENDS = ("reference", "cpp", "cuda", "triton", "sdpa", "flash", "cudnn", "efficient", "math", "xformers")
NEVER_ON_GPU = "never run on a GPU: no committed result shows it passing there (use_backend takes it all the same)"

_ROWS: dict[str, "Op"] = {}
_LIBRARIES: dict[str, torch.library.Library] = {}  # a Library takes its registrations away when it is collected
# None, or {row name: (backend name, whether a refusal is an error)}
_FORCED: ContextVar[dict[str, tuple[str, bool]] | None] = ContextVar("lfm_fast_backend", default=None)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """What float32 arithmetic may differ from float64 by: |got - want| <= absolute + relative |want|.

    low: added to absolute where the result has 16 bits, for rows whose kernels keep something in 16 bits on the way.
    """

    absolute: float
    relative: float
    origin: str
    low: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to run a row.

    why_not takes the row's arguments and returns None or the reason, as a sentence without full stop, why these cannot
    be served. available says the same for any arguments (no library, no package). kernel takes the row's arguments;
    without one, the compiled operator `lfm_fast_NAME::ROW` runs. opt_in is the reason why the table never takes this
    backend by itself; `use_backend` does. with_gradient runs instead of a composite row's compiled operator where a
    gradient is needed.
    """

    name: str
    devices: tuple[str, ...]
    why_not: Callable[..., str | None]
    available: Callable[[], str | None] = _library.load
    kernel: Callable | None = None
    opt_in: str | None = None
    with_gradient: Callable | None = None

    def refusal(self, args: tuple, *, forced: bool = False) -> str | None:
        device = args[0].device.type
        if device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, the tensors are on {device}"
        if self.opt_in and not forced:
            return self.opt_in
        return self.available() or self.why_not(*args)


def cuda_backend(why_not: Callable[..., str | None], shown_on_gpu: bool = False) -> Backend:
    """The backend whose kernel is csrc/cuda/ROW.cu. shown_on_gpu: a committed result shows the row passing on a GPU;
    until then it is opt-in."""
    opt_in = None if shown_on_gpu else NEVER_ON_GPU
    return Backend(name="cuda", devices=("cuda",), why_not=why_not, available=_library.load_cuda, opt_in=opt_in)


@dataclass(kw_only=True, eq=False)
class Op:
    """A row: everything there is to know about one op. Calling it checks the arguments, then dispatches."""

    name: str
    schema: str  # "(Tensor z_0, ...) -> (Tensor z_t, Tensor target)"; the first argument is a tensor
    reference: Callable  # plain PyTorch, same arguments and defaults as the schema; strides as the kernels give them
    check: Callable  # same arguments; raises ValueError
    backends: tuple[Backend, ...]  # in order of preference
    arguments: Callable[..., dict]  # builds the arguments of a case: (shape, device, dtype, layout, ...) -> keywords
    cases: tuple[dict, ...]  # keywords of `arguments`: what the tests run
    sizes: tuple[dict, ...]  # keywords of `arguments`: what the benchmarks run
    cost: Callable[..., tuple[int, int]]  # same arguments as the schema -> (bytes read and written once, FLOPs)
    tolerance: Tolerance
    setup_context: Callable | None = None  # (ctx, inputs, output); ctx.needed names the inputs that want a gradient
    backward: Callable | None = None  # (ctx, *gradients or None) -> {argument name: gradient}
    not_differentiable: tuple[str, ...] = ()  # arguments for which a gradient is refused rather than left out
    shared: tuple[str, ...] = ()  # arguments and results that all samples have in common: they have no batch dimension
    mutates: tuple[
        str, ...
    ] = ()  # lists of tensors that are changed in place; such a row has no gradient and no result
    # Made of PyTorch's differentiable operators on every backend: autograd, fake tensors and torch.compile see those
    # (the backend is then chosen when a graph is traced), so that it needs no setup_context and no backward.
    composite: bool = False
    like_compiled: Callable | None = None  # a composite row's compiled kernels, as fake tensors see them
    prepare: Callable[[tuple], tuple] | None = None  # what autocast makes of the arguments
    rank: Callable[["Op", tuple], tuple[str, dict[str, str]]] | None = None  # (backend, reasons against the others)
    overload: Callable = field(init=False, repr=False)
    argument_names: tuple[str, ...] = field(init=False)

    def __call__(self, *args):
        args = args if self.prepare is None else self.prepare(args)
        self.check(*args)
        # PyTorch gives a custom op a ZERO tangent without a word, and has no batching rule for it: under a transform
        # the reference runs, whose every operation is PyTorch's own.
        if inside_transform():
            return self.reference(*args)
        if self.composite and not torch.compiler.is_compiling():
            return self._run(self.choose(args), args)
        if torch.is_grad_enabled():
            if self.not_differentiable or self.mutates:
                self._refuse_gradient(args)
        elif not torch.compiler.is_compiling():
            if not self.mutates and unwatched(args):
                # through the dispatcher a kernel written in Python costs 5 of 20 microseconds, in a cold cache 12
                name = self.choose(args)
                if name == "reference" or name in self.compiled_names:  # Triton knows no lazy negation; PyTorch does
                    return self._run(name, args)
            with torch._C._AutoDispatchBelowAutograd():
                return self.overload(*args)
        return self.overload(*args)

    def bind(self, *args, **kwargs) -> tuple:
        """Arguments in the schema's order, defaults filled in."""
        try:
            bound = inspect.signature(self.reference).bind(*args, **kwargs)
        except TypeError as error:
            raise ValueError(f"{self.name}: {error}.") from None
        bound.apply_defaults()
        return tuple(bound.arguments.values())

    @cached_property
    def kernels(self) -> dict[str, Callable]:
        compiled = {b.name: _compiled_kernel(b, self.name) for b in self.compiled}
        return compiled | {b.name: b.kernel for b in self.backends if b.kernel}

    @cached_property
    def compiled_names(self) -> frozenset[str]:
        return frozenset(b.name for b in self.compiled)

    @property
    def compiled(self) -> tuple[Backend, ...]:
        return tuple(b for b in self.backends if b.kernel is None)

    @cached_property
    def types(self) -> str:
        """The schema in the words of a compiled library: types alone, such as "(Tensor, int) -> Tensor"."""
        schema = self.overload._schema
        taken, given = (", ".join(map(_type, values)) for values in (schema.arguments, schema.returns))
        return f"({taken}) -> " + (given if len(schema.returns) == 1 else f"({given})")

    def choose(self, args: tuple) -> str:
        """The name of the backend that runs these arguments."""
        forced = _FORCED.get()
        if forced is not None and self.name in forced:
            name, strict = forced[self.name]
            if name == "reference":
                return name
            reason = self.named(name).refusal(args, forced=True)
            if reason is None:
                return name
            if strict:
                raise ValueError(f"{self.name} cannot run on backend {name!r}: {reason}.")
        if self.rank is not None:
            return self.rank(self, args)[0]
        return next(iter(self.willing(args)), "reference")

    def willing(self, args: tuple, *, forced: bool = False) -> list[str]:
        """The backends that would serve these arguments, in the row's order."""
        return [b.name for b in self.backends if b.refusal(args, forced=forced) is None]

    def named(self, name: str) -> Backend:
        return next(b for b in self.backends if b.name == name)

    def dispatch(self, *args):
        """The operator's kernel. Compiled backends look at the shapes again themselves; for a Python one, a call of
        `torch.ops.lfm_fast.NAME` that went round the public function is checked here, or it would broadcast."""
        args = args if self.prepare is None else self.prepare(args)
        if args[0] is None or self.rank is not None:  # PyTorch lets None pass for a tensor; rank looks at the shapes
            self.check(*args)
        name = self.choose(args)
        if name not in self.compiled_names:
            self.check(*args)
        if self.mutates:
            self._announce_change(args)
        elif self.backward is None and torch.is_grad_enabled():
            self._refuse_gradient(args)  # with a backward, that does it
        return self._run(name, args)

    def _run(self, name: str, args: tuple):
        if name != "reference":
            return self.kernels[name](*args)
        if self.composite or not torch._C._is_any_autocast_enabled():
            return self.reference(*args)
        # `prepare` has seen to autocast; inside, a matrix product in float32 is meant to be one
        with torch.autocast(args[0].device.type, enabled=False):
            return self.reference(*args)

    def fake(self, *args):
        """The fake (meta) kernel. It checks as well: with one meta tensor among real ones PyTorch comes here, and a
        row that changes tensors in place would begin to before it found out."""
        self.check(*args)
        return (self.like_compiled or self.reference)(*args)

    def _refuse_gradient(self, args: tuple) -> None:
        for name, value in zip(self.argument_names, args):
            tensors = value if isinstance(value, list) else [value]
            refused = self.mutates or name in self.not_differentiable
            if not refused or not any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors):
                continue
            if self.mutates:
                raise ValueError(
                    f"{self.name} changes tensors in place and has no gradient, but {name} requires one: "
                    "call it under torch.no_grad()."
                )
            raise ValueError(f"{self.name} has no gradient for {name}, which requires one: pass {name}.detach().")

    def _announce_change(self, args: tuple) -> None:
        """What PyTorch does for its own in-place ops: a backward that had saved one of these tensors must notice."""
        if torch.is_grad_enabled():
            self._refuse_gradient(args)
        for name, value in zip(self.argument_names, args):
            if name in self.mutates:
                torch.autograd.graph.increment_version(value)

    def _setup_context(self, ctx, inputs, output) -> None:
        self._refuse_gradient(inputs)
        ctx.set_materialize_grads(False)
        ctx.forced = _FORCED.get()  # autograd's threads on a GPU have contexts of their own
        # by name, because PyTorch flattens lists and drops trailing defaults in ctx.needs_input_grad
        ctx.needed = {n for n, v in zip(self.argument_names, inputs) if isinstance(v, torch.Tensor) and v.requires_grad}
        self.setup_context(ctx, inputs, output)

    def _backward(self, ctx, *gradients):
        token = _FORCED.set(_FORCED.get() if ctx.forced is None else ctx.forced)
        try:
            by_name = self.backward(ctx, *gradients)
        finally:
            _FORCED.reset(token)
        return tuple(by_name.get(name) for name in self.argument_names[: len(ctx.needs_input_grad)])


def _compiled_kernel(backend: Backend, name: str) -> Callable:
    """The compiled operator; where a gradient is needed, what the backend has in its place."""
    operator = getattr(getattr(torch.ops, f"lfm_fast_{backend.name}"), name).default
    if backend.with_gradient is None:
        return operator
    return lambda *args: (backend.with_gradient if needs_gradient(*args) else operator)(*args)


def inside_transform() -> bool:
    """Inside forward-mode AD (dual levels, torch.func.jvp), or vmap, grad and the other torch.func transforms."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def _type(argument) -> str:
    """PyTorch prints Optional[Tensor] and List[Tensor], the library Tensor? and Tensor[]."""
    name = str(argument.real_type).replace("SymInt", "int")
    return re.sub(r"List\[(\w+)\]", r"\1[]", re.sub(r"Optional\[(\w+)\]", r"\1?", name))


def _in_its_library(op: Op, backend: Backend) -> Backend:
    """The compiled backend, available where the library that was loaded holds this row's kernel as well."""
    load, asked = _library.load_cuda if backend.name == "cuda" else _library.load, backend.available
    return replace(backend, available=lambda: load() or _library.lacks(backend.name, op.name, op.types) or asked())


def _library_of(namespace: str) -> torch.library.Library:
    if namespace not in _LIBRARIES:
        _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
    return _LIBRARIES[namespace]


def register(op: Op) -> Op:
    """Define the row's operators with PyTorch. Chooses nothing, loads nothing."""
    library = _library_of("lfm_fast")
    library.define(op.name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(op.name, op.dispatch, f"Composite{'Implicit' if op.composite else 'Explicit'}Autograd")
    if not op.composite:
        torch.library.register_fake(f"lfm_fast::{op.name}", op.fake, lib=library)
    if op.backward is not None:
        name = f"lfm_fast::{op.name}"
        torch.library.register_autograd(name, op._backward, setup_context=op._setup_context, lib=library)
    for backend in op.compiled:
        namespace = f"lfm_fast_{backend.name}"
        _library_of(namespace).define(op.name + op.schema)
        if op.like_compiled is not None:
            torch.library.register_fake(f"{namespace}::{op.name}", op.fake, lib=_library_of(namespace))
    op.backends = tuple(_in_its_library(op, b) if b.kernel is None else b for b in op.backends)
    op.overload = getattr(torch.ops.lfm_fast, op.name).default
    op.argument_names = tuple(argument.name for argument in op.overload._schema.arguments)
    _ROWS[op.name] = op
    return op


def rows() -> dict[str, Op]:
    """Every row by name."""
    return dict(_ROWS)


def row(op) -> Op:
    """The row of a name or of a public function."""
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _ROWS:
        raise ValueError(f"There is no op {name!r}; there are {', '.join(sorted(_ROWS))}.")
    return _ROWS[name]


@contextmanager
def use_backend(name: str, ops=None) -> Iterator[None]:
    """Within this context, run ops on the named backend.

    Args:
        name: "reference", "cpp", "cuda" or "triton"; for attention also "sdpa", "flash", "cudnn", "efficient", "math"
            or "xformers".
        ops: None (every row that has the backend; where it is missing or refuses, the row keeps its default), or a name
            or a list of names: these rows must run on it, and a call it refuses raises with the reason.

    Follows contextvars: it holds in this thread and task only. A gradient runs where its forward pass was told to, in
    whatever thread.

    Raises:
        ValueError: an unknown backend or op; a row in `ops` without that backend.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> with ops.use_backend("reference"):
        ...     ops.philox_normal(torch.arange(2), 3, seed=0).shape
        torch.Size([2, 3])
    """
    if name not in BACKENDS:
        raise ValueError(f"There is no backend {name!r}; there are {', '.join(BACKENDS)}.")
    named = None if ops is None else [row(op) for op in ([ops] if isinstance(ops, str) or callable(ops) else ops)]
    having = [r for r in _ROWS.values() if name == "reference" or any(b.name == name for b in r.backends)]
    for r in named or ():
        if r not in having:
            raise ValueError(f"{r.name} has no backend {name!r}; it has {', '.join(_names(r))}.")
    chosen = {r.name: (name, named is not None) for r in (having if named is None else named)}
    token = _FORCED.set({**(_FORCED.get() or {}), **chosen})
    try:
        yield
    finally:
        _FORCED.reset(token)


def _names(r: Op) -> list[str]:
    return [b.name for b in r.backends] + ["reference"]
