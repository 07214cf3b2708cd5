"""Contenders in a process of their own.

What Inductor compiles brings its own threads and allocations: in the process of the others it slows them and itself
down many times over. The process does nothing between its turns. One serves a whole session, a workload at a time.
"""

import multiprocessing
import os
import shutil
import time

import torch

_shared: list["Worker"] = []


def why_no_compiler() -> str | None:
    """The reason why Inductor cannot compile here, or None."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler}) for Inductor"


def shared() -> "Worker":
    """The session's worker, started when first asked for."""
    if not _shared:
        _shared.append(Worker())
    return _shared[0]


def close() -> None:
    while _shared:
        _shared.pop().close()


class Worker:
    """Compiled contenders of one workload at a time in another process; `turn` times one call there."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, torch.get_num_threads()), daemon=True)
        self.process.start()
        theirs.close()

    def build(self, specification: tuple[str, dict], names: tuple[str, ...]):
        """Compile; yields (name, result, facts) of each contender: when it comes, its turns can be taken."""
        self.connection.send(("build", specification, tuple(names)))
        for _ in names:
            name, arrays, facts = self._receive()
            yield name, [torch.from_numpy(array) for array in arrays], facts
            self.connection.send(("go on",))

    def turn(self, name: str) -> float:
        self.connection.send(("turn", name))
        return self._receive()

    def forget(self) -> None:
        """Free what the last workload holds."""
        self.connection.send(("forget",))

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()

    def _receive(self):
        try:
            return self.connection.recv()
        except EOFError:
            _shared.clear()
            raise RuntimeError("the process of the compiled contenders died; what it said stands above") from None


def _serve(connection, num_threads):
    from benchmarks.memory import keep_freed_memory

    torch.set_num_threads(num_threads)
    keep_freed_memory()
    turns = {}
    try:
        while True:
            command, *arguments = connection.recv()
            if command == "build":
                _build(connection, turns, *arguments)
            else:
                _obey(connection, turns, command, *arguments)
    except EOFError:  # the other end closed: the session is over
        pass


def _obey(connection, turns, command, *arguments):
    if command == "turn":
        connection.send(turns[arguments[0]]())
    elif command == "forget":
        turns.clear()
        torch.compiler.reset()


def _build(connection, turns, specification, names):
    """Send each contender when it is ready, and serve its turns until asked to go on with the next."""
    from benchmarks.catalogue import build
    from benchmarks.measure import Turns, profiled
    from benchmarks.plain import forced

    workload = build(specification)
    for name in names:
        start = time.perf_counter()
        contender = workload.compiled(name)
        with forced(contender.backend):
            result = [x.detach().float().numpy() for x in contender.result()]
            (contender.peak or contender.call)()
            facts = {"compile_seconds": time.perf_counter() - start, "how": contender.how}
            facts["peak_bytes"], _ = profiled(contender.peak or contender.call)
        turns[name] = Turns(contender)
        connection.send((name, result, facts))
        while (command := connection.recv())[0] != "go on":
            _obey(connection, turns, *command)
