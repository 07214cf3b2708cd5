"""The U-Nets in inference: a forward of the networks behind LFM's ADM checkpoints, and of the others by name."""

import functools
from dataclasses import replace

import torch
from torch import Tensor, nn

import lfm_fast
from benchmarks.names import AGAIN, EAGER, FAST, REFERENCE
from benchmarks.networks import LATENT_SHAPE, PRECISIONS, fastest_compiled
from benchmarks.plain import WITHOUT_OPS, forced
from benchmarks.workloads import Contender, Workload

# adm-original as released for CelebA-HQ 256; without labels, as all but ImageNet's are
ARGUMENTS = {"adm-original": {"channel_mult": (1, 2, 2, 2)}}
CONTEXT_TOKENS = 64


def network(name: str, precision: str) -> nn.Module:
    """A new U-Net, with numbers in place of the zeros that it starts with, of which nothing would come out."""
    torch.manual_seed(0)
    model = lfm_fast.create_model(name, **ARGUMENTS.get(name, {})).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.to(getattr(torch, precision))


class UNetForward(Workload):
    """model(t, z) without gradients, a sample at a time of its own; a network under a context gets one."""

    profiled = (FAST, EAGER)

    def __init__(self, name: str, batch_size: int, precision: str):
        self.name, self.precision, self.images = name, precision, batch_size
        self.z, self.t = lfm_fast.noise(batch_size, LATENT_SHAPE, seed=0), torch.linspace(0.1, 0.9, batch_size)
        self.flops = batch_size * flops(name)

    def contenders(self):
        fast = lfm_fast.optimize(network(self.name, "float32"), PRECISIONS[self.precision])
        plain = network(self.name, self.precision)
        return {
            FAST: self._calling(fast),
            REFERENCE: self._calling(plain, "reference"),
            AGAIN: self._calling(fast),
            EAGER: self._calling(plain, WITHOUT_OPS),
        }

    def compiled(self, name):
        with forced(WITHOUT_OPS):
            model, words = fastest_compiled(lambda: network(self.name, self.precision), self._run)
        return replace(self._calling(model, WITHOUT_OPS), how=words)

    def truth(self) -> list[Tensor]:
        return [self._run(network(self.name, "float64"), torch.float64)]

    def _calling(self, model, backend=None) -> Contender:
        return Contender(lambda: self._run(model), lambda: [self._run(model)], backend)

    @torch.no_grad()
    def _run(self, model, dtype=torch.float32) -> Tensor:
        context = {}
        if "context" in model.sample_arguments:
            shape = (CONTEXT_TOKENS, model.config["context_dim"])
            context["context"] = lfm_fast.noise(self.images, shape, seed=1).to(dtype)
        return model(self.t.to(dtype), self.z.to(dtype), **context)


@functools.cache
def flops(name: str) -> int:
    with torch.device("meta"):
        return lfm_fast.create_model(name, **ARGUMENTS.get(name, {})).flops_per_sample()
