"""Every compiled kernel takes and gives the C++ types of its row's schema, on every backend.

Across the stable ABI arguments are untyped words: a kernel whose C++ types differ from the schema reads a pointer as a
number. Each library derives the signatures of its kernels from their C++ types; here they are held against the rows.
"""

import pytest
import torch
from row_cases import ROWS, signature_lines

from lfm_fast import _library

COMPILED = sorted({backend.name for row in ROWS.values() for backend in row.compiled})


def rows_with(backend):
    return {name: row for name, row in ROWS.items() if any(b.name == backend for b in row.compiled)}


def differences(rows, text):
    """{kernel: (what the library says, what the row says)} where they differ; None where one of them has nothing."""
    found, wanted = signature_lines(text), {name: row.types for name, row in rows.items()}
    names = [line.split("(")[0] for line in text.splitlines() if line]
    twice = {name: ("registered twice", wanted.get(name)) for name in names if names.count(name) > 1}
    every = found.keys() | wanted.keys()
    return twice | {n: (found.get(n), wanted.get(n)) for n in every if found.get(n) != wanted.get(n)}


@pytest.fixture
def says(library, request):
    """What the libraries say of their kernels, by backend; the CUDA library's own words need neither GPU nor CUDA."""

    def of(backend):
        if backend == "cpp":
            return library.signatures()
        if not _library.path(backend).is_file():
            pytest.skip(f"{_library.path(backend).name} is not built here")
        return library.signatures(backend)

    return of


@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_signatures_are_the_rows_schemas(backend, says):
    assert differences(rows_with(backend), says(backend)) == {}


def test_signatures_of_the_emulated_cuda_sources_are_the_rows_schemas(emulated):
    """So they are held where there is no nvcc."""
    assert differences(rows_with("cuda"), emulated.signatures()) == {}


@pytest.mark.parametrize("backend", COMPILED)
def test_compiled_operators_have_the_rows_schemas(backend):
    """Defined from the one text in the row, annotations of what is written and all."""
    for row in rows_with(backend).values():
        compiled = getattr(getattr(torch.ops, f"lfm_fast_{backend}"), row.name).default._schema
        assert str(compiled).split("::")[1] == str(row.overload._schema).split("::")[1], row.name


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_schema_says_what_is_written(row):
    written = [a.name for a in row.overload._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == list(row.mutates)
    assert all(r.alias_info is None for r in row.overload._schema.returns)


RIGHT = {
    "philox_normal": "(Tensor, int, int, int, int) -> Tensor",
    "interpolate": "(Tensor, Tensor, Tensor?, Tensor?, int, int) -> (Tensor, Tensor)",
    "guided_step": (
        "(Tensor, Tensor, Tensor?, Tensor?, Tensor[], Tensor, Tensor?, float, float, Tensor?, Tensor?, int, int, bool)"
        " -> (Tensor, Tensor, Tensor)"
    ),
}
WRONG = {
    "a float for an int": ("philox_normal", "(Tensor, float, int, int, int) -> Tensor"),
    "an argument too few": ("philox_normal", "(Tensor, int, int, int) -> Tensor"),
    "an argument too many": ("philox_normal", "(Tensor, int, int, int, int, int) -> Tensor"),
    "another order": ("interpolate", "(Tensor, Tensor, Tensor?, int, Tensor?, int) -> (Tensor, Tensor)"),
    "a tensor that must be there": ("interpolate", "(Tensor, Tensor, Tensor, Tensor?, int, int) -> (Tensor, Tensor)"),
    "a result too few": ("interpolate", "(Tensor, Tensor, Tensor?, Tensor?, int, int) -> Tensor"),
    "no result": ("philox_normal", "(Tensor, int, int, int, int) -> ()"),
    "a tensor for a list": ("guided_step", RIGHT["guided_step"].replace("[]", "")),
    "a bool for an int": ("guided_step", RIGHT["guided_step"].replace("bool", "int")),
}


def text_of(signatures):
    return "".join(f"{name}{types}\n" for name, types in signatures.items())


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_signature_is_seen(mistake):
    rows = {name: ROWS[name] for name in RIGHT}
    assert differences(rows, text_of(RIGHT)) == {}
    name, types = WRONG[mistake]
    assert differences(rows, text_of({**RIGHT, name: types})) == {name: (types, RIGHT[name])}


def test_a_kernel_too_many_too_few_or_twice_is_seen():
    rows = {name: ROWS[name] for name in RIGHT}
    assert differences(rows, text_of({**RIGHT, "unknown": "() -> ()"})) == {"unknown": ("() -> ()", None)}
    assert differences({**rows, "gelu_tanh": ROWS["gelu_tanh"]}, text_of(RIGHT)).keys() == {"gelu_tanh"}
    assert differences(rows, text_of(RIGHT) + text_of(RIGHT)).keys() == rows.keys()
