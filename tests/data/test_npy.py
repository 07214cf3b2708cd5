"""Our reader of .npy files against NumPy's own writer."""

import ast

import numpy as np
import pytest

from lfm_fast.data.npy import read_npy

VALUES = np.arange(24).reshape(2, 3, 4)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f2", "<f8", "<i8", ">i2", "|u1", "|b1", "<c8"])
@pytest.mark.parametrize(
    "values",
    [VALUES, np.asfortranarray(VALUES), VALUES[:, ::2], VALUES[:0], VALUES[0, 0], np.array(7)],
    ids=["rows", "columns", "strided", "empty", "vector", "scalar"],
)
def test_what_numpy_writes(tmp_path, values, dtype, version):
    values = values.astype(dtype, order="K")
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array(file, values, version)
    found = read_npy(tmp_path / "a.npy")
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values, strict=True)


def written(path, header: str, data: bytes = b"\0" * 8):
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        "{'shape': (1,), 'descr': '<i8', 'fortran_order': False}",
        "{ 'fortran_order' :False , 'shape' :( 1 , ), 'descr':'<i8' , } \n",
    ],
)
def test_headers_that_others_write(tmp_path, header):
    assert read_npy(written(tmp_path / "a.npy", header)).tolist() == [0]


@pytest.mark.parametrize(
    "header",
    [
        "",
        "{}",
        "{'descr': '<i8', 'fortran_order': False}",
        "{'descr': '<i8', 'shape': (1,)}",
        "{'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1,)",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1,), 'more': 1}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (9**9,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (2,)}",
        "{'descr': '<i8', 'fortran_order': 0, 'shape': (1,)}",
        "{'descr': '<q9', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '|O8', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '<i8')], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1,)}" + " " * 10_000,
    ],
)
def test_damaged_headers(tmp_path, header):
    with pytest.raises(ValueError, match=r"a\.npy is damaged or gone \(\w+\): make or copy it again\."):
        read_npy(written(tmp_path / "a.npy", header))


def test_every_shortened_file_and_a_longer_one_are_refused(tmp_path):
    for values in (np.array([5, 6]), np.empty(0)):
        np.save(tmp_path / "whole.npy", values)
        whole = (tmp_path / "whole.npy").read_bytes()
        for other in (*(whole[:length] for length in range(len(whole))), whole + b"\0"):
            (tmp_path / "a.npy").write_bytes(other)
            with pytest.raises(ValueError, match="damaged or gone"):
                read_npy(tmp_path / "a.npy")


def test_nothing_that_threads_disturb(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", VALUES)

    def disturbed(text):
        raise SystemError("AST constructor recursion depth mismatch (before=5, after=9)")

    monkeypatch.setattr(ast, "literal_eval", disturbed)
    np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), VALUES)
