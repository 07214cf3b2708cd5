"""TorchCFM's networks: called model(t, x, y), time from noise to data."""

import torch
from torch import Tensor

from lfm_fast.interop.adapter import Adapter


class TorchCFMVelocity(Adapter):
    """A network of TorchCFM as our velocity field.

        u(z, t) = -model(1 - t, z, y)
        u(z, t) = -model([z, 1 - t])          joined: its networks of points, which take time as a last column

    model: called model(t (B,), x (B, ...)) or model(t, x, y=y), t = 0 being noise and t = 1 data. joined: z is (B, D)
    and the model takes (B, D + 1). null_label: what y=None stands for; without it a call without labels has no y.

    Raises ValueError for what cannot be used, before the model is called.

    >>> field = TorchCFMVelocity(lambda t, x: x * t[:, None])
    >>> field(torch.tensor([0.25, 1.0]), torch.ones(2, 2))[:, 0].tolist()
    [-0.75, -0.0]
    >>> TorchCFMVelocity(torch.nn.Linear(3, 2), joined=True)(torch.rand(5), torch.ones(5, 2)).shape
    torch.Size([5, 2])

    Source: Tong et al., arXiv 2302.00482, section 3 (x_0 noise, x_1 data); the library's README.
    """

    reverses = True

    def __init__(self, model, *, joined: bool = False, null_label: int | None = None):
        super().__init__(model, null_label=null_label)
        self.joined = joined

    def call(self, z: Tensor, time: Tensor, y: Tensor | None, **kwargs):
        if not self.joined:
            return self.network(time, z, **({} if y is None else {"y": y}), **kwargs)
        if z.ndim != 2 or y is not None:
            raise ValueError(
                f"joined=True is for points (B, D) without labels, but z is {tuple(z.shape)} "
                f"{'without' if y is None else 'with'} labels."
            )
        return self.network(torch.cat([z, time[:, None].to(z.dtype)], dim=1), **kwargs)
