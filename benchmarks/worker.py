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
    """A compiled workload in another process; `turn` times one call there."""

    def __init__(self, specification: tuple[str, dict]):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, specification, torch.get_num_threads())
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.compile_seconds, results, self.peak_bytes = self.connection.recv()
        self.results = [torch.from_numpy(array) for array in results]

    def turn(self, backend: str | None) -> float:
        self.connection.send(backend)
        return self.connection.recv()

    def close(self) -> None:
        self.connection.close()
        self.process.join(timeout=10)
        if self.process.is_alive():
            self.process.kill()


def _serve(connection, specification, num_threads):
    from benchmarks.catalogue import build
    from benchmarks.measure import Turns, peak_bytes

    torch.set_num_threads(num_threads)
    workload = build(specification)
    workload.compile()
    start = time.perf_counter()
    results = [x.detach().float().numpy() for x in workload.result()]
    workload.call()
    compile_seconds = time.perf_counter() - start
    connection.send((compile_seconds, results, peak_bytes(workload.call)))
    turns = {}
    try:
        while True:
            backend = connection.recv()
            if backend not in turns:
                turns[backend] = Turns(workload.call, backend)
            connection.send(turns[backend]())
    except EOFError:  # the other end closed: the measurement is over
        pass
