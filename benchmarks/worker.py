"""A contender in a process of its own.

What Inductor compiles brings its own threads and allocations: in the process of the others it slows them and itself
down many times over. The process does nothing between its turns.
"""

import multiprocessing
import os
import shutil
import time

import torch


def why_no_compiler() -> str | None:
    """The reason why Inductor cannot compile here, or None."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"there is no C++ compiler ({compiler}) for Inductor"


class Worker:
    """A compiled workload in another process; `turn` times one call there.

    backends: what the ops are forced to, None for the table's own choice. `facts` and `results` are by backend.
    """

    def __init__(self, specification: tuple[str, dict], backends: tuple[str | None, ...]):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, specification, backends, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.facts, self.results = {}, {}
        for backend in backends:
            self.facts[backend], arrays = self._receive()
            self.results[backend] = [torch.from_numpy(array) for array in arrays]

    def turn(self, backend: str | None) -> float:
        self.connection.send(backend)
        return self._receive()

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()

    def _receive(self):
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError("the process of the compiled contender died; what it said stands above") from None


def _serve(connection, specification, backends, num_threads):
    from benchmarks.catalogue import build
    from benchmarks.measure import Turns, forced, peak_bytes
    from benchmarks.memory import keep_freed_memory

    torch.set_num_threads(num_threads)
    keep_freed_memory()
    workload = build(specification)
    workload.compile()
    turns = {}
    for backend in backends:
        start = time.perf_counter()
        with forced(backend):
            results = [x.detach().float().numpy() for x in workload.result()]
            workload.call()
            facts = {"compile_seconds": time.perf_counter() - start, "peak_bytes": peak_bytes(workload.call)}
        connection.send((facts, results))
        turns[backend] = Turns(workload.call, backend)
    try:
        while True:
            connection.send(turns[connection.recv()]())
    except EOFError:  # the other end closed: the measurement is over
        pass
