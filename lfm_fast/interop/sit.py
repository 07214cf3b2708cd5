"""SiT's networks: called network(x, t, y), time from noise to data, perhaps with learned sigmas."""

from torch import Tensor

from lfm_fast.flow.paths import Linear
from lfm_fast.interop.adapter import Adapter


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
