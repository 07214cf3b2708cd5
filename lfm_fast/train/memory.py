"""The memory of a training step: what its operators have made and not yet let go, counted as it runs.

On fake tensors, which have shapes and no storage, this takes seconds for any size of network.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lfm_fast import ops
from lfm_fast.train.config import AUTOCAST


@dataclass(frozen=True)
class StepMemory:
    """Bytes beside weights and optimizer: `kept` between forward and backward pass, at the `peak` without the
    gradients of the weights, and at the peak with those of them that are there by then."""

    kept: int
    peak: int
    peak_with_gradients: int


class LiveBytes(TorchDispatchMode):
    """Within this context, the bytes of all storages that operators have made and that still exist: `held`, and
    `apart` for those of tensors that were set apart. `peak` is the most of the first, `peak_of_all` of both."""

    def __init__(self):
        super().__init__()
        self.held = self.apart = self.peak = self.peak_of_all = 0
        self._sizes, self._apart = {}, set()  # by the identity of a storage, which its C++ object has

    def ignore(self, tensor: Tensor) -> None:
        """Do not count a tensor that was there before."""
        self._sizes.setdefault(tensor.untyped_storage()._cdata, 0)

    def set_apart(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self._sizes and key not in self._apart:
            self._apart.add(key)
            self.held -= self._sizes[key]
            self.apart += self._sizes[key]

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self._count(x.untyped_storage())
        self.peak, self.peak_of_all = max(self.peak, self.held), max(self.peak_of_all, self.held + self.apart)
        return result

    def _count(self, storage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.held += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key) -> None:
        if key in self._apart:
            self._apart.remove(key)
            self.apart -= self._sizes.pop(key)
        else:
            self.held -= self._sizes.pop(key)


def to_bfloat16(model) -> None:
    """What `model.to(torch.bfloat16)` does, for fake weights, which that cannot replace."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                low = torch.empty_like(parameter, dtype=torch.bfloat16)
                module._parameters[name] = torch.nn.Parameter(low, parameter.requires_grad)


def of_step(model, samples: int, latent_shape, precision: str, condition: Tensor | None = None) -> StepMemory:
    """Run a forward and backward pass on `samples` latents of `latent_shape`, real or fake as the weights are."""
    given = {} if condition is None else {"condition": condition}
    live = LiveBytes()
    for parameter in model.parameters():
        live.ignore(parameter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: live.set_apart(p.grad)) for p in trained]
    device = trained[0].device
    try:
        with live, torch.device(device):
            t, z, target = torch.rand(samples), torch.zeros(samples, *latent_shape), torch.zeros(samples, *latent_shape)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision in AUTOCAST):
                velocity = model(t, z, **given)
            kept = live.held
            ops.velocity_loss(velocity, target).sum().backward()
            del velocity
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad()
    return StepMemory(kept, live.peak, live.peak_of_all)


def too_little(error: Exception) -> str | None:
    """What to do about an error that is of memory that was not enough; None for another error."""
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return None
    return (
        "there is not enough memory; a smaller --batch-size, more --accumulation-steps or --activation-checkpointing "
        f"selective take less, and --dry-run says how much ({(str(error) or 'MemoryError').splitlines()[0]})"
    )
