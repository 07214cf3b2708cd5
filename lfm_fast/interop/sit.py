"""SiT's networks: called network(x, t, y), time from noise to data, perhaps with learned sigmas."""

import copy

import torch
from torch import Tensor

from lfm_fast.flow.paths import Linear
from lfm_fast.interop.adapter import Adapter
from lfm_fast.models import DiT
from lfm_fast.models.layers import time_features


class SiTVelocity(Adapter):
    """A network of SiT as our velocity field.

        u(z, t) = -network(z, 1 - t, y)                    predicts="velocity"
        u from network(z, 1 - t, y) by `path`              predicts="noise", "data" or "score"

    network: a module or function network(x (B, C, H, W), s (B,), y (B,)), s = 0 being noise and s = 1 data, not scaled.
    A network that returns 2 C channels returns learned sigmas in the second half, which are dropped. path: Linear() as
    published; VariancePreservingTrig() is what SiT calls GVP, VariancePreserving() its VP;
    `lfm_fast.sample` takes it from here. null_label: what y=None stands for (1000 in the published ImageNet networks).

    Raises ValueError for what cannot be used, before the network is called.

    >>> network = lambda x, s, y: 2 * x * s[:, None, None, None]
    >>> field, z = SiTVelocity(network, null_label=1000), torch.ones(2, 4, 8, 8)
    >>> field(torch.tensor([0.25, 1.0]), z)[:, 0, 0, 0].tolist()
    [-1.5, -0.0]

    Source: Ma et al., arXiv 2401.08740, section 2, whose eq. 1 has our direction of time; the networks have the other.
    """

    reverses = True
    needs_labels = True

    def __init__(self, network, *, predicts: str = "velocity", path=None, null_label: int | None = None):
        path = Linear() if path is None else path
        super().__init__(network, predicts=predicts, path=path, null_label=null_label, learned_sigma=True)

    def call(self, z: Tensor, time: Tensor, y: Tensor | None, **kwargs):
        return self.network(z, time, y, **kwargs)


@torch.no_grad()
def turned(model: DiT) -> DiT:
    """A DiT whose time runs the other way.

        turned(model)(t, z, y) = -model(1 - t, z, y)

    So it makes weights of SiT that predict a velocity a network of ours, without an adapter, and ours SiT's; twice is
    the network itself. Exact, not fitted: its time features turn by cos(f - f t) = cos f cos(f t) + sin f sin(f t) and
    sin(f - f t) = sin f cos(f t) - cos f sin(f t), so the layer above them takes

        W = [C, S]  ->  [C cos f + S sin f, C sin f - S cos f]

    in float64, rounded once to the weights' type, and the last layer changes its sign.

    Raises ValueError for another network than our DiT.

    >>> model = lfm_fast.DiT(image_size=8, hidden_size=32, depth=1, num_heads=2).double()
    >>> _ = torch.nn.init.normal_(model.final_layer.linear.weight)
    >>> t, z = torch.tensor([0.3], dtype=torch.float64), torch.randn(1, 4, 8, 8, dtype=torch.float64)
    >>> torch.allclose(turned(model)(t, z), -model(1 - t, z), rtol=1e-10)
    True

    Source: Ma et al., arXiv 2401.08740, section 2; arXiv 2212.09748 for the features of time.
    """
    if not isinstance(model, DiT):
        raise ValueError(f"time is turned in the weights of a DiT, not of a {type(model).__name__}.")
    model = copy.deepcopy(model)
    first, last = model.t_embedder.mlp[0], model.final_layer.linear
    one = torch.ones(1, dtype=torch.float64, device=first.weight.device)
    cos, sin = time_features(one, model.t_embedder.width, torch.float64)[0].chunk(2)
    of_cos, of_sin = first.weight.double().chunk(2, dim=1)
    first.weight.copy_(torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1))
    for parameter in (last.weight, last.bias):
        parameter.neg_()
    return model
