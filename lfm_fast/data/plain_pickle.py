"""Pickles of plain data and arrays of bytes, put together here: nothing in them is looked up, called or imported."""

import pickletools

import numpy as np

_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT")
_TEXTS = ("BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8")
_CONSTANTS = frozenset(_NUMBERS + _TEXTS + _BYTES)
_NAMED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_DTYPES = ("numpy dtype",)
_ARRAYS = ("numpy ndarray",)
_MAKES_ARRAY = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_FILLS_ARRAY = ("numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer")
_MAKES_BYTES = ("_codecs encode",)  # how Python 3 writes bytes for Python 2


class Refused(ValueError):
    """A pickle that is damaged or holds anything else; the message is the reason."""


def read_plain_pickle(content: bytes):
    """The numbers, texts, lists, dictionaries and arrays of uint8 in a pickle of protocol 2 or later.

    Keys are text, and Python 2's strings come as text, a character for each byte. Arrays are found alone or directly
    in the outermost dictionary.

    Raises:
        Refused: anything else is in it, a class or a function among that, or it is damaged.

    Example:
        >>> import numpy, pickle
        >>> read_plain_pickle(pickle.dumps({"data": numpy.arange(3, dtype=numpy.uint8), "labels": [4, 5]}))
        {'data': array([0, 1, 2], dtype=uint8), 'labels': [4, 5]}
    """
    machine = _Machine()
    try:
        for operation, argument, _ in pickletools.genops(content):
            machine.do(operation.name, argument)
        found = machine.stack.pop()
    except Refused:
        raise
    # pickletools and a stack that is not what an operation expects: ValueError, IndexError, KeyError, TypeError, ...
    except Exception as error:
        raise Refused(f"it is no pickle of plain data, or damaged ({' '.join(str(error).split())[:80]})") from error
    return _finished(found)


def _text(item) -> str:
    """A text; bytes become one, too. What else could be here may be nested so that its hash takes for ever."""
    if isinstance(item, bytes):
        return item.decode("latin-1")
    if not isinstance(item, str):
        raise TypeError(f"a {type(item).__name__} stands for a text")
    return item


def _finished(found):
    """Arrays in place of what they were made from, in the outermost dictionary or alone."""
    if isinstance(found, dict):
        return {key: _finished(value) if isinstance(value, _Array) else value for key, value in found.items()}
    if isinstance(found, _Array):
        if found.values is None:
            raise Refused("it has an array without values")
        return found.values
    return found


class _Global:
    """The name of a function or class, which is all that is ever known of it."""

    def __init__(self, name):
        self.name = name


class _Array:
    """An array whose pixels are still to come."""

    values = None

    def fill(self, state):
        _, shape, kind, by_columns, content = state
        if isinstance(content, str):
            content = content.encode("latin-1")
        if kind not in ("u1", "uint8") or by_columns or not isinstance(content, bytes | bytearray):
            raise Refused("it has an array that is not one of bytes")
        self.values = np.frombuffer(content, np.uint8).reshape(tuple(shape))


class _Type(str):
    """A NumPy type's name."""

    __slots__ = ()


class _Machine:
    """The stack that a pickle's operations work on."""

    def __init__(self):
        self.stack, self.memo = [], {}

    def do(self, name, argument):
        """One operation."""
        if name in _CONSTANTS:
            self.stack.append(argument)
        elif name in _NAMED:
            self.stack.append(_NAMED[name])
        elif name in _TUPLES:
            items = self.stack[-_TUPLES[name] :]
            if len(items) < _TUPLES[name]:
                raise IndexError("its stack is too short")
            self.stack[-_TUPLES[name] :] = [tuple(items)]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            act = getattr(self, f"do_{name.lower()}", None)
            if act is None:
                raise Refused(f"it has the operation {name}, which plain data need not")
            act(argument)

    def do_memoize(self, _):
        self.memo[len(self.memo)] = self.stack[-1]

    def do_mark(self, _):
        self.stack.append(_MARK)

    def do_empty_dict(self, _):
        self.stack.append({})

    def do_empty_list(self, _):
        self.stack.append([])

    def do_empty_tuple(self, _):
        self.stack.append(())

    def do_tuple(self, _):
        self.stack.append(tuple(self._since_mark()))

    def do_append(self, _):
        item = self.stack.pop()
        self._top(list).append(item)

    def do_appends(self, _):
        items = self._since_mark()
        self._top(list).extend(items)

    def do_setitem(self, _):
        value, key = self.stack.pop(), self.stack.pop()
        self._top(dict)[_text(key)] = value

    def do_setitems(self, _):
        items = self._since_mark()
        self._top(dict).update(zip(map(_text, items[::2]), items[1::2], strict=True))

    def do_global(self, argument):
        self.stack.append(_Global(argument))

    def do_stack_global(self, _):
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(_Global(f"{_text(module)} {_text(name)}"))

    def do_reduce(self, _):
        arguments, called = self.stack.pop(), self.stack.pop()
        name = called.name if isinstance(called, _Global) else type(called).__name__
        if name in _DTYPES:
            self.stack.append(_Type(_text(arguments[0])))
        elif name in _MAKES_ARRAY and arguments[0].name in _ARRAYS:
            self.stack.append(_Array())
        elif name in _FILLS_ARRAY:
            content, kind, shape, order = arguments
            self.stack.append(_Array())
            self.stack[-1].fill((1, shape, kind, order != "C", content))
        elif name in _MAKES_BYTES and arguments[1:] == ("latin1",):
            self.stack.append(arguments[0].encode("latin-1"))
        else:
            raise Refused(f"it would call {name[:60]!r}")

    def do_build(self, _):
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, _Array):
            built.fill(state)
        elif not isinstance(built, _Type):  # what else a type says of itself is the byte order of single bytes
            raise Refused("it would change an object")

    def _since_mark(self):
        place = len(self.stack) - 1 - self.stack[::-1].index(_MARK)
        items = self.stack[place + 1 :]
        del self.stack[place:]
        return items

    def _top(self, kind):
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"it adds to a {type(self.stack[-1]).__name__}")
        return self.stack[-1]
