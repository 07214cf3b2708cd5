"""The registry: which backend runs, how to force one, what explain says, and what one row is made of."""

import dataclasses
import inspect
import threading

import pytest
import torch
from children import run_child
from compare import assert_same_bits
from row_cases import ROWS, arguments_of, results
from torch.utils._python_dispatch import TorchDispatchMode

from lfm_fast import _library, ops
from lfm_fast.ops import _registry
from lfm_fast.ops._registry import Backend, Op, Tolerance

Z, C = torch.ones(2, 3), torch.ones(4, 2)
COMPILED = {name: row for name, row in ROWS.items() if any(b.name == "cpp" for b in row.compiled)}


@pytest.fixture
def without_library(monkeypatch):
    """As on a machine without a compiler."""
    sentence = "the compiled library is not installed: there was no compiler"
    # a Backend holds the function itself, so the row's backends are replaced
    for row in ROWS.values():
        gone = tuple(
            Backend(name=b.name, devices=b.devices, why_not=b.why_not, available=lambda: sentence) for b in row.backends
        )
        monkeypatch.setattr(row, "backends", gone)
    return sentence


@pytest.fixture(scope="module")
def toy():
    """A row registered by a test: what adding an op takes."""
    row = Op(
        name="toy_double",
        schema="(Tensor x, float by=2.0) -> Tensor",
        reference=lambda x, by=2.0: x * by,
        check=lambda x, by=2.0: None,
        backends=(
            Backend(
                name="triton",
                devices=("cpu",),
                why_not=lambda x, by=2.0: "x is negative" if bool((x < 0).any()) else None,
                available=lambda: None,
                kernel=lambda x, by=2.0: x * by + 1000,  # tells which one ran
            ),
        ),
        arguments=lambda shape=(2,): {"x": torch.ones(shape)},
        cases=({},),
        sizes=({},),
        cost=lambda x, by=2.0: (0, 0),
        tolerance=Tolerance(absolute=0.0, relative=0.0, origin="exact"),
    )
    yield _registry.register(row)
    del _registry._ROWS["toy_double"]


def test_first_willing_backend_runs_else_the_reference(toy):
    assert toy(torch.ones(1)).item() == 1002
    assert toy(-torch.ones(1)).item() == -2
    assert torch.ops.lfm_fast.toy_double(torch.ones(1), 3.0).item() == 1003
    assert toy(torch.ones(1, device="meta")).is_meta


def test_a_row_named_in_ops_refuses_with_the_reason(toy):
    with ops.use_backend("triton", ops="toy_double"):
        assert toy(torch.ones(1)).item() == 1002
        with pytest.raises(ValueError, match="toy_double cannot run on backend 'triton': x is negative"):
            toy(-torch.ones(1))
    with ops.use_backend("triton"):
        assert toy(-torch.ones(1)).item() == -2, "not named: keeps its default"


def test_an_opt_in_backend_runs_only_when_forced(toy, monkeypatch):
    shy = dataclasses.replace(toy.backends[0], opt_in="it has never run on a GPU")
    monkeypatch.setattr(toy, "backends", (shy,))
    assert toy(torch.ones(1)).item() == 2
    assert ops.explain(toy).refused == {"triton": "it has never run on a GPU"}
    with ops.use_backend("triton"):
        assert toy(torch.ones(1)).item() == 1002
        assert toy(-torch.ones(1)).item() == -2, "why_not still holds"


def test_contexts_nest_and_end(toy):
    one = torch.ones(1)
    with ops.use_backend("reference"):
        assert toy(one).item() == 2
        with ops.use_backend("triton", ops=["toy_double"]):
            assert toy(one).item() == 1002
            with ops.use_backend("reference", ops=["interpolate"]):
                assert toy(one).item() == 1002, "the inner context speaks of another row"
        assert toy(one).item() == 2
    assert toy(one).item() == 1002
    with pytest.raises(ZeroDivisionError), ops.use_backend("reference"):
        raise ZeroDivisionError
    assert toy(one).item() == 1002


def test_another_thread_keeps_its_own_choice(toy):
    seen = []
    with ops.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(toy(torch.ones(1)).item()))
        thread.start()
        thread.join()
    assert seen == [1002]


def test_a_gradient_runs_where_its_forward_was_told_to_in_another_thread_too(monkeypatch):
    """As autograd's own threads on a GPU, whose contexts know of no `use_backend`."""
    ran, run = [], Op._run

    def noted(row, name, args):
        ran.append((row.name, name))
        return run(row, name, args)

    monkeypatch.setattr(Op, "_run", noted)
    x = torch.randn(2, 8, requires_grad=True)
    for backend in ("reference", "cpp"):
        with ops.use_backend(backend, "gelu_tanh"), ops.use_backend(backend, "gelu_tanh_backward"):
            y = ops.gelu_tanh(x)
        thread = threading.Thread(target=y.sum().backward)
        thread.start()
        thread.join()
        assert ran[-2:] == [("gelu_tanh", backend), ("gelu_tanh_backward", backend)]


def test_wrong_names_are_refused():
    with pytest.raises(ValueError, match="no backend 'gpu'; there are reference, cpp, cuda, triton"):
        ops.use_backend("gpu").__enter__()
    with pytest.raises(ValueError, match=r"no op 'interpolat'; there are [a-z_, ]*guided_step, "):
        ops.use_backend("cpp", ops=["interpolat"]).__enter__()
    with pytest.raises(ValueError, match=r"modulated_layer_norm has no backend 'cuda'; it has .*reference"):
        ops.use_backend("cuda", ops=ops.modulated_layer_norm).__enter__()


def test_rows_without_the_backend_keep_their_default(monkeypatch):
    for row in ROWS.values():
        args, ran = arguments_of(row, row.cases[0]), []
        default = row.choose(args)
        monkeypatch.setattr(row, "reference", lambda *a, f=row.reference, r=ran: r.append("reference") or f(*a))
        spied = {name: lambda *a, n=name, f=f, r=ran: r.append(n) or f(*a) for name, f in row.kernels.items()}
        monkeypatch.setitem(row.__dict__, "kernels", spied)
        with ops.use_backend("triton"):
            row(*args)
        assert ran == [default], row.name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "narrow"),
    [("guided_step", name) for name in ("velocity", "unconditional", "scale", "weights", "error_weights")]
    + [("interpolate", "z_1"), ("velocity_loss", "target"), ("velocity_loss", "weight")],
)
def test_the_operator_itself_broadcasts_no_sample_over_the_batch(name, narrow, dtype):
    """Called as torch.ops.lfm_fast.NAME; float64 runs on the reference, float32 on the library where there is one."""
    row = ROWS[name]
    state = {"state": dtype, "error": True} if name == "guided_step" else {}
    args = list(row.bind(**row.arguments(shape=(3, 4, 5), dtype=dtype, **state)))
    assert row.overload(*args)[0].shape[0] == 3
    position = row.argument_names.index(narrow)
    args[position] = args[position][:1]
    with pytest.raises((ValueError, RuntimeError)):
        row.overload(*args)
    with ops.use_backend("reference"), pytest.raises(ValueError, match=narrow):
        row.overload(*args)


def test_forcing_the_library_that_is_missing_says_why(without_library):
    sentence = f"interpolate cannot run on backend 'cpp': {without_library}"
    with ops.use_backend("cpp", ops="interpolate"), pytest.raises(ValueError, match=sentence):
        ops.interpolate(Z, C, Z)
    with ops.use_backend("cpp"):
        ops.interpolate(Z, C, Z)


def test_without_the_library_everything_runs_on_the_reference(without_library):
    for row in ROWS.values():
        args = arguments_of(row, row.cases[0])
        assert row.choose(args) == "reference"
        row(*args)
        explanation = ops.explain(row.name, *args)
        assert explanation.backend == "reference"
        here = [b for b in row.backends if "cpu" in b.devices]
        assert {b.name: explanation.refused[b.name] for b in here} == {b.name: without_library for b in here}


def test_explain_names_the_backend_and_each_refusal(library):
    explanation = ops.explain(ops.interpolate, Z, C, z_1=Z)
    assert explanation.backend == "cpp"
    assert "cpp" not in explanation.refused
    wide = ops.explain("interpolate", Z.double(), C.double(), index=torch.arange(2))
    assert wide.backend == "reference"
    text = "interpolate runs on reference.\n  not cpp: it computes in float32, and an argument is float64."
    assert str(wide).startswith(text)
    meta = ops.explain("philox_normal", torch.arange(2, device="meta"), 8, seed=0)
    assert "it runs on cpu, the tensors are on meta" in meta.refused["cpp"]
    with ops.use_backend("reference"):
        assert ops.explain("interpolate", Z, C, Z).refused["cpp"] == "reference comes first"


def test_explain_refuses_what_the_op_refuses():
    with pytest.raises(ValueError, match="coefficients is"):
        ops.explain("interpolate", Z, Z, Z)
    with pytest.raises(ValueError, match="interpolate: missing a required argument"):
        ops.explain("interpolate", Z)
    with pytest.raises(ValueError, match="no op 'convolution'"):
        ops.explain("convolution")


def test_explain_without_arguments_tells_of_every_row():
    text = ops.explain()
    for name in ROWS:
        assert f"{name} runs on" in text
    assert ops.explain("guided_step").op == "guided_step"


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_one_row_speaks_with_one_voice(row, monkeypatch):
    """Reference, check, cost and public function take the schema's arguments with the schema's defaults."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # else the Triton backend, not run here, refuses CPU tensors
    schema = {a.name: a.default_value if a.has_default_value() else "required" for a in row.overload._schema.arguments}
    inner = row.name.endswith(("_backward", "_with_lse")) or row.name.startswith("tile_")  # others call those
    public = [] if inner else [getattr(ops, row.name)]
    for function in (row.reference, row.check, row.cost, *public):
        parameters = inspect.signature(function).parameters.values()
        found = {p.name: "required" if p.default is p.empty else p.default for p in parameters}
        assert found == schema, function
    for backend in row.backends:
        assert any(backend.why_not(*arguments_of(row, case)) is None for case in row.cases), backend.name
    assert row.tolerance.origin
    assert row.sizes


@pytest.mark.parametrize("row", COMPILED.values(), ids=COMPILED)
def test_compiled_kernels_refuse_what_would_read_out_of_bounds(row, library):
    """Called without the row in front of them."""
    kernel, backend = getattr(torch.ops.lfm_fast_cpp, row.name), row.named("cpp")
    if backend.available() is not None:
        pytest.skip(backend.available())
    calls = (arguments_of(row, case) for case in row.cases)
    args = next(list(args) for args in calls if args[0].shape[0] > 1 and backend.why_not(*args) is None)
    assert results(row, args, kernel)
    spoilers = {"coefficients": lambda x: x[:3], "weights": lambda x: x[:, :1], "target": lambda x: x[:, :1]}
    for position, (name, value) in enumerate(zip(row.argument_names, args)):
        if isinstance(value, torch.Tensor) and name in spoilers:
            with pytest.raises(RuntimeError):
                kernel(*args[:position], spoilers[name](value), *args[position + 1 :])
        if isinstance(value, torch.Tensor):
            with pytest.raises(RuntimeError):
                kernel(*args[:position], value.to(torch.complex64), *args[position + 1 :])


def test_a_kernel_with_other_arguments_does_not_serve_its_row(library, monkeypatch):
    """It would read a pointer as a number."""
    older = library.signatures().replace("\ninterpolate(", "\ninterpolate(int, ")
    assert older != library.signatures()
    monkeypatch.setattr(_library, "signatures", lambda device="cpu": older)
    _library.lacks.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="the compiled library is older than the sources: build it again with"):
            explanation = ops.explain(ops.interpolate, Z, C, z_1=Z)
    finally:
        monkeypatch.undo()
        _library.lacks.cache_clear()
    assert explanation.backend == "reference"
    sentence = "the compiled library is older than this row (its kernel takes other arguments): build it again with"
    assert explanation.refused["cpp"].startswith(sentence)


OLDER = """
import torch
from row_cases import ROWS, arguments_of, results
from torch.utils._python_dispatch import TorchDispatchMode
from lfm_fast import _library, ops
assert _library.load() is None
served = {name for name, row in ROWS.items() for b in row.compiled if b.name == "cpp" and not b.available()}
for name, row in ROWS.items():
    for case in row.cases:
        results(row, arguments_of(row, case))
x = torch.linspace(-3, 3, 8)
compiled = torch.compile(lambda x: ROWS["gelu_tanh"](x), backend="aot_eager", fullgraph=True)
assert torch.equal(compiled(x), ROWS["gelu_tanh"].reference(x))
try:
    with ops.use_backend("cpp", ops="gelu_tanh"):
        ops.gelu_tanh(x)
except ValueError as error:
    print(error)
print(*sorted(served))
"""


def test_kernels_that_a_library_lacks_run_on_the_reference(library, tmp_path):
    """A copy of the library in which three kernels have other names."""
    data, missing = _library.path().read_bytes(), ("gelu_tanh", "gelu_tanh_backward", "guided_step")
    for name in missing:
        assert name.encode() + b"\0" in data
        data = data.replace(name.encode() + b"\0", name[:-1].encode() + b"0\0")
    (tmp_path / "_C_cpu.so").write_bytes(data)
    said = run_child(OLDER, tmp_path / "journal", 300, LFM_FAST_LIBRARY=str(tmp_path / "_C_cpu.so"))
    refusal, served = said.splitlines()
    sentence = "the compiled library is older than this row (it has no such kernel): build it again with"
    assert refusal.startswith(f"gelu_tanh cannot run on backend 'cpp': {sentence}")
    here = {name for name, row in COMPILED.items() if row.named("cpp").available() is None}
    assert set(served.split()) == here - {*missing}


def test_importing_ops_loads_and_decides_nothing():
    """The library is loaded at the first call that could use it."""
    import subprocess
    import sys

    code = (
        "import lfm_fast.ops, lfm_fast._library as l; assert l.load.cache_info().currsize == 0;"
        "import torch; assert hasattr(torch.ops.lfm_fast, 'interpolate');"
        "lfm_fast.ops.philox_normal(torch.arange(2), 4, 0); assert l.load.cache_info().currsize == 1"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=_library.__file__.rsplit("/", 2)[0])


class _Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class _Subclass(torch.Tensor):
    """Sees every operator that is called with it."""

    names = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(str(func))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("backend", ["reference", "cpp"])  # cpp where there is a compiled library
def test_without_gradients_the_way_round_the_dispatcher_is_taken_where_nobody_sees_the_difference(backend, monkeypatch):
    row, args = ROWS["interpolate"], (Z, C, Z)
    with ops.use_backend(backend):
        expected = row.overload(*args)
        with torch.no_grad():
            monkeypatch.setattr(row, "overload", None)  # a call of it would fail
            assert all(map(torch.equal, row(*args), expected))
            monkeypatch.undo()
            with _Seen() as seen:
                row(*args)
            assert "lfm_fast.interpolate.default" in seen.names
            row(Z.as_subclass(_Subclass), C, Z)
            assert "lfm_fast.interpolate.default" in _Subclass.names
            # a negative view is resolved by PyTorch on the way
            negative = torch.complex(Z, Z).conj().imag
            assert negative.is_neg()
            assert all(map(torch.equal, row(negative, C, Z), row(-Z, C, Z)))


@pytest.mark.parametrize("row", [row for row in ROWS.values() if not row.composite], ids=lambda row: row.name)
def test_a_reference_computes_in_float32_under_autocast(row):
    """A row without its kernel must give what it gives with it: autocast would make its inner products bfloat16."""
    args = arguments_of(row, row.cases[0])
    with ops.use_backend("reference"):
        want = results(row, args)
        with torch.autocast("cpu", torch.bfloat16):
            got = results(row, args)
    for g, w in zip(got, want, strict=True):
        assert g.dtype is w.dtype
        assert_same_bits(g, w)
