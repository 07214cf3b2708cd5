"""What a training step has before its network: z_t and its target, from cached latents that are in memory.

`python -m benchmarks.latents --device cuda` times the same on a GPU: images per second, and the share of a copy's rate.
"""

import argparse
import itertools
import math
import statistics
import time

import torch
from torch import Tensor

from benchmarks.ceilings import working_set_bytes
from benchmarks.feeding import SEED, step_seconds
from benchmarks.names import COPY, EAGER
from benchmarks.networks import LATENT_SHAPE
from benchmarks.plain import WITHOUT_OPS
from benchmarks.settings import QUICK
from benchmarks.workloads import Contender, Workload, exact_normals
from lfm_fast import ops
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.resident import ResidentLatents
from lfm_fast.flow import time_samplers
from lfm_fast.flow.paths import Linear
from lfm_fast.ops import _registry
from lfm_fast.ops.streams import STREAM_NOISE, STREAM_POSTERIOR

STEP_BATCH = 2 if QUICK else 16  # of the training step whose share is told
PATH = Linear(sigma_min=1e-5)


class ResidentFeeding(Workload):
    """From sample numbers to z_t and target, as train.step does at given t: rows of the table, and one op over it.

    Its share of a training step of as many DiT-S/2 samples stands beside it.
    """

    def __init__(self, num_items: int, batch_size: int, dtype: str):
        self.images, self.batch_size = batch_size, batch_size
        self.source = ResidentLatents(drawn_cache(num_items, getattr(torch, dtype)))
        self.step_seconds = step_seconds(STEP_BATCH) / STEP_BATCH * batch_size
        self.note = f"a table of {num_items} posteriors in {dtype}; a training step of DiT-S/2 takes "
        self.note += f"{self.step_seconds:.1f} s for as many"
        self.numbers, self.taken = torch.arange(batch_size), 0
        self.coefficients = PATH.coefficients(time_samplers.draw("uniform", self.numbers, SEED))
        self.moved, self.flops = _registry.row("posterior_interpolate").cost(*self._arguments(self.numbers))

    def _arguments(self, numbers):
        rows, _ = self.source.posteriors(numbers, SEED)
        return self.source.mean, rows, numbers, self.coefficients, self.source.log_variance, SEED

    def _next(self) -> Tensor:
        numbers = self.numbers + self.taken
        self.taken += self.batch_size
        return numbers

    def call(self):
        return ops.posterior_interpolate(*self._arguments(self._next()))

    def result(self):
        return list(ops.posterior_interpolate(*self._arguments(self.numbers)))

    def truth(self):
        mean, rows, numbers, coefficients, log_variance, _ = self._arguments(self.numbers)
        numel = math.prod(LATENT_SHAPE)

        def normals(stream):
            return exact_normals(numbers, numel, SEED, stream, 0).view(-1, *LATENT_SHAPE)

        z_0 = mean[rows].double() + torch.exp(log_variance[rows].double() / 2) * normals(STREAM_POSTERIOR)
        alpha, sigma, d_alpha, d_sigma = coefficients.double().view(4, -1, 1, 1, 1)
        noise = normals(STREAM_NOISE)
        return [alpha * z_0 + sigma * noise, d_alpha * z_0 + d_sigma * noise]

    def facts(self, name, seconds):
        return {"share_of_step": seconds / self.step_seconds}

    def contenders(self):
        count = math.ceil(working_set_bytes() / self.moved)
        sources = itertools.cycle([torch.full((self.moved // 8,), 1.25) for _ in range(count)])
        return {
            **super().contenders(),
            COPY: Contender(lambda: next(sources).clone()),
            EAGER: Contender(self._eager, None, WITHOUT_OPS),
        }

    def _eager(self):
        """As one writes it, with the noise of PyTorch's generator: another one, so nothing compares."""
        rows, _ = self.source.posteriors(self._next(), SEED)
        mean, log_variance = self.source.mean[rows].float(), self.source.log_variance[rows].float()
        z_0 = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        t, noise = torch.rand(self.batch_size), torch.randn_like(z_0)
        return torch.lerp(z_0, noise, t.view(-1, 1, 1, 1)), noise - z_0


def drawn_cache(count: int, dtype: torch.dtype) -> LatentCache:
    """In memory: means of unit variance, standard deviations of e^-2."""
    generator = torch.Generator().manual_seed(1)
    mean = torch.empty(count, *LATENT_SHAPE, dtype=dtype).normal_(generator=generator)
    log_variance = torch.empty_like(mean).normal_(-4, 0.1, generator=generator)
    shard = {"mean": mean, "log_variance": log_variance, "labels": torch.arange(count) % 10}
    channels = LATENT_SHAPE[0]
    return LatentCache([shard], [str(k) for k in range(10)], [0.0] * channels, [1.0] * channels, {})


def on_a_gpu(device: str, num_items: int) -> None:
    """A line for each dtype, batch size and backend."""
    for dtype, batch_size in itertools.product((torch.bfloat16, torch.float32), (256, 1024)):
        source = ResidentLatents(drawn_cache(num_items, dtype), device=device)
        numbers = torch.arange(batch_size)
        rows, index = (x.to(device) for x in (source.posteriors(numbers, SEED)[0], numbers))
        coefficients = PATH.coefficients(time_samplers.draw("uniform", index, SEED))
        args = (source.mean, rows, index, coefficients, source.log_variance, SEED)
        moved = _registry.row("posterior_interpolate").cost(*args)[0]
        memory = torch.empty(2, moved // 8, device=device)
        copied = 2 * memory[0].numel() * 4 / _seconds(lambda memory=memory: memory[1].copy_(memory[0]), device)
        for backend in ("cpp", "reference") if device == "cpu" else ("cuda", "triton", "reference"):
            with ops.use_backend(backend):
                seconds = _seconds(lambda args=args: ops.posterior_interpolate(*args), device)
            print(
                f"{dtype!s:<14} batch {batch_size:<5} {backend:<10} {batch_size / seconds:12,.0f} images/s, "
                f"{moved / seconds / 1e9:8.1f} GB/s, {moved / seconds / copied:.0%} of a copy's rate"
            )


def _seconds(call, device: str, rounds: int = 30) -> float:
    """The median of one call's time, on a GPU by events."""
    if device == "cpu":
        return statistics.median(_timed(call) for _ in range(rounds))
    call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def _timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--num-items", type=int, default=100_000)
    given = parser.parse_args()
    on_a_gpu(given.device, given.num_items)
