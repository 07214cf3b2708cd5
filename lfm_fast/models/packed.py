"""Layers of a network that is only sampled from any more: weights packed for the processor's tiles."""

import torch
from torch import Tensor, nn

from lfm_fast import ops
from lfm_fast.ops.packed_linear import pack, unpack
from lfm_fast.ops.packed_linear_int8 import pack as pack_int8
from lfm_fast.ops.packed_linear_int8 import unpack as unpack_int8


class PackedLinear(nn.Module):
    """What an nn.Linear computes (`ops.packed_linear`), with the GELU after it where `gelu` says so.

    It has that layer's state dict: weights come out as they went in, rounded, and are packed when they are loaded.
    """

    dtype = torch.bfloat16  # that it computes in

    def __init__(self, linear: nn.Linear, gelu: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.gelu = linear.in_features, linear.out_features, gelu
        for name, tensor in self.pack(linear.weight).items():
            self.register_buffer(name, tensor, persistent=name == "weight")
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(self.dtype).clone())

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        """The buffers that hold a weight (N, K)."""
        return {"weight": pack(weight)}

    def unpacked(self) -> Tensor:
        """The weight (N, K) as it was rounded."""
        return unpack(self.weight, self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return ops.packed_linear(x.to(self.dtype), self.weight, self.bias, self.out_features, self.gelu)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, gelu={self.gelu}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.unpacked()

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        name = prefix + "weight"
        plain = state_dict.get(name)
        if plain is not None and plain.shape == (self.out_features, self.in_features):
            packed = self.pack(plain)
            state_dict = {**state_dict, name: packed.pop("weight")}
            for other, tensor in packed.items():
                getattr(self, other).copy_(tensor)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class PackedLinearFloat(PackedLinear):
    """The same in float32: every weight is held as the three bfloat16 that it is the sum of, and not rounded."""

    dtype = torch.float32

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        return {"weight": pack(weight, parts=3)}


class PackedLinearInt8(PackedLinear):
    """The same with products of int8 (`ops.packed_linear_int8`); its weights come out as float32."""

    @staticmethod
    def pack(weight: Tensor) -> dict[str, Tensor]:
        packed, scale = pack_int8(weight)
        return {"weight": packed, "scale": scale}

    def unpacked(self) -> Tensor:
        return unpack_int8(self.weight, self.scale, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        packed = self.weight, self.scale, self.bias
        return ops.packed_linear_int8(x.to(self.dtype), *packed, self.out_features, self.gelu)


class PackedMlp(nn.Module):
    """`layers.Mlp` on packed weights, its GELU part of the first product."""

    def __init__(self, mlp: nn.Module, layer: type[PackedLinear] = PackedLinear):
        super().__init__()
        self.fc1 = layer(mlp.fc1, gelu=True)
        self.fc2 = layer(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))
