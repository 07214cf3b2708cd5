"""NumPy's .npy files, read by any number of threads at once.

NumPy reads their headers with `ast.literal_eval`, which in Python 3.11 is not safe in threads: now and then it meets a
sound file with "SystemError: AST constructor recursion depth mismatch". Numbers need no more than a regular expression.
"""

import math
import os
import re
from pathlib import Path

import numpy as np

_HEADER = re.compile(
    r"\s*\{\s*"
    r"(?:(?:'descr'\s*:\s*'(?P<dtype>[<>|=]?[a-zA-Z]\d+)'"
    r"|'fortran_order'\s*:\s*(?P<fortran>True|False)"
    r"|'shape'\s*:\s*\((?P<shape>[\d,\s]*)\))\s*(?:,\s*)?)+"
    r"\}\s*"
)
_LENGTH_BYTES = {b"\x01\x00": 2, b"\x02\x00": 4, b"\x03\x00": 4}
_LONGEST_HEADER = 10_000  # NumPy's own limit


def read_npy(path: Path) -> np.ndarray:
    """The numbers in a file; ValueError if it is damaged or gone, or holds anything but numbers."""
    try:
        with open(path, "rb") as file:
            dtype, shape, fortran = _header(file)
            count = math.prod(shape)
            # before memory is asked for that a damaged shape speaks of
            if count * dtype.itemsize != os.fstat(file.fileno()).st_size - file.tell():
                raise ValueError("another length than the shape says")
            values = np.frombuffer(file.read(), dtype, count)
            return values.reshape(shape, order="F" if fortran else "C")
    except Exception as error:  # damaged headers are met with errors of any kind
        raise ValueError(f"{path} is damaged or gone ({type(error).__name__}): make or copy it again.") from error


def _header(file):
    """(dtype, shape, whether columns come first) of an open file, which is then at its first number."""
    if file.read(6) != b"\x93NUMPY":
        raise ValueError("no .npy file")
    length = int.from_bytes(file.read(_LENGTH_BYTES[file.read(2)]), "little")
    text = file.read(min(length, _LONGEST_HEADER + 1)).decode("ascii")
    found = _HEADER.fullmatch(text)
    if len(text) != length or found is None or None in found.groups():
        raise ValueError("a damaged header")
    shape = tuple(int(side) for side in found["shape"].split(",") if side.strip())
    return np.dtype(found["dtype"]), shape, found["fortran"] == "True"
