"""What the U-Nets have in common beside how they are called: compiling, checkpointing, counting operations."""

import contextlib

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lfm_fast.models import checkpointing
from lfm_fast.models.compiling import Compiled
from lfm_fast.models.velocity_network import VelocityNetwork


class ConvolutionalNetwork(VelocityNetwork):
    """A network of blocks that all differ in shape. A subclass gives `velocity(t, z, y, *context)`, all inputs being
    explicit, and there calls its blocks by `run`; its `config` has `dropout`."""

    products = contextlib.nullcontext  # what the products of a forward run in (models/precision.py)
    _compiled_velocity = None

    def forward(self, t: Tensor, z: Tensor, y: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Velocity (B, C, H, W) at times t (B,) (or one time for all, ()), latents z (B, C, H, W) and labels y (B,)."""
        return self.checked_velocity(t, z, y, condition)

    def checked_velocity(self, t, z, y, condition, *context: Tensor) -> Tensor:
        """`velocity`, or its compiled form, of inputs that have been checked."""
        z = self.joined(z, condition)
        self.check_inputs(t, z, y)
        if y is None:
            y = torch.full((z.shape[0],), self.no_label(), device=z.device)
        inputs = t.expand(z.shape[0]), z, y, *context
        with self.products():
            if self._compiled_velocity is None:
                return self.velocity(*inputs)
            # in one layout and in tensors of our own: a graph is made for strides, and marks those it is called with
            inputs = (x.contiguous().view(x.shape) for x in (*inputs[:2], y.long(), *context))
            return self._compiled_velocity(self, *inputs)

    def no_label(self) -> int:
        """What stands for y=None."""
        return self.num_classes

    def maps(self, z: Tensor) -> Tensor:
        """z in the weights' dtype, and with channels innermost where convolutions run in 16 bits, which is faster."""
        weight = next(self.parameters())
        z, device, dtype = z.to(weight.dtype), z.device.type, weight.dtype
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return z.contiguous(memory_format=torch.channels_last) if dtype.itemsize == 2 else z

    def run(self, block, *tensors: Tensor | None) -> Tensor:
        """block(*tensors), keeping for the backward pass what `activation_checkpointing` says."""
        mode, dropout = self.activation_checkpointing, self.training and self.config["dropout"] > 0
        if mode == "none" or not torch.is_grad_enabled():
            return block(*tensors)
        return checkpointing.made_again(block, *tensors, mode=mode, dropout=dropout)

    def compile(self, part: str = "velocity", **options) -> None:
        """Compile in place, with torch.compile's options: one graph of the whole network, which serves batches of any
        size, labelled and unlabelled calls. `part` may be "block" as well, as for a DiT: the blocks of a U-Net all
        differ in shape, so it is the same.

        Raises ValueError for another `part`. Copies of the network are not compiled.

        >>> from lfm_fast.models import ADM
        >>> model = ADM(image_size=4, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[])
        >>> model.compile(backend="eager")
        >>> model(torch.rand(1), torch.randn(1, 4, 4, 4)).shape
        torch.Size([1, 4, 4, 4])
        """
        if part not in ("velocity", "block"):
            raise ValueError(f"part is {part!r}, expected 'velocity' or 'block'.")
        if options.get("backend", "inductor") == "inductor" and "mode" not in options:
            # its own choice of layouts takes convolutions for contiguous that are not, where the batch is unknown
            options["options"] = {"layout_optimization": False, **options.get("options", {})}
        self._compiled_velocity = Compiled(type(self).velocity, **options)

    def flops_per_sample(self) -> int:
        """Floating-point operations of one forward on one sample: 2 per multiply-add of products and convolutions."""
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            same = type(self)(**{name: value for name, value in self.config.items() if name != "family"})
            same.velocity(*same.one_sample())
        return counter.get_total_flops()

    def one_sample(self) -> tuple[Tensor, ...]:
        """Inputs of `velocity` for one sample."""
        side = self.image_size
        return torch.empty(1), torch.empty(1, self.in_channels, side, side), torch.empty(1, dtype=torch.int64)
