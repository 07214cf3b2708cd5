"""A process of its own for what should not share ours. It imports no more than it is asked to run."""

import os
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from multiprocessing import get_context


class Elsewhere:
    """Another process, for contenders that should not share this one's allocator, caches or compiler settings.

    environment: variables it has besides ours. It is started when first called, and again after it was ended.
    """

    def __init__(self, environment: dict[str, str]):
        self._environment, self._pool = environment, None

    def __call__(self, function: Callable, *arguments, seconds: float):
        """function(*arguments) there: a module's own function, of plain values. Raises what it raises, and RuntimeError
        where the process dies or is ended because it took longer than `seconds`."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=_set_variables, initargs=(self._environment,)
            )
        try:
            return self._pool.submit(function, *arguments).result(seconds)
        except FutureTimeout:
            self.end(kill=True)
            raise RuntimeError(f"it took longer than {seconds:g} s") from None
        except BrokenExecutor:
            self.end()
            raise RuntimeError("its process died") from None

    def end(self, kill: bool = False) -> None:
        if self._pool is None:
            return
        if kill:
            for process in list((self._pool._processes or {}).values()):
                process.kill()
        self._pool.shutdown(cancel_futures=True)
        self._pool = None


def _set_variables(environment: dict[str, str]) -> None:
    os.environ.update(environment)


@contextmanager
def elsewhere(**environment: str):
    found = Elsewhere(environment)
    try:
        yield found
    finally:
        found.end()
