"""Guidance by the gradient of a classifier of noisy latents."""

import torch

from lfm_fast.flow.checks import describe
from lfm_fast.flow.paths import Linear
from lfm_fast.guidance.linear import LinearGuidance, check_labels_given
from lfm_fast.guidance.network import weight_type
from lfm_fast.guidance.scale import per_sample

_NO_DATA = torch.finfo(torch.float32).eps  # alpha below it: what z_t holds of the data is lost in rounding the noise


class ClassifierGuidance(LinearGuidance):
    """Towards what a classifier takes for the label: v = v_uncond - scale h(t) grad log p(y | z_t).

        h = sigma sigma' - sigma^2 alpha' / alpha    (t / (1 - t) on the straight path)

    Where alpha = 0, at t = 1 of most paths, z_t tells nothing of the label, and the term is 0. (h grows as the gradient
    falls, and their product has a limit, E[z_0] - E[z_0 | y] on the straight path; but no gradient of 0 tells it. An
    integration from t = 1 makes its first evaluation without.)
    v_uncond is model(t, z, null_label), or model(t, z, y=None) without one; a network trained without labels will do.
    With the exact classifier scale=1 gives the conditional velocity. The model makes one forward per evaluation;
    forwards of the classifier are not counted.

    Args:
        classifier: called classifier(t, z) with t (B,) and z (B, ...) of the state's type, or of its weights';
            returns logits (B, K), differentiable in z. Each row of them has to be of its own sample alone: put its
            batch norms into eval mode.
        scale: gamma; a number, (B,), function of t or table as of LinearGuidance, where 0 asks no classifier.
        interval: (low, high) in t; outside it no classifier is asked.

    Raises ValueError as LinearGuidance does, for a classifier that cannot be called, and for logits that are none.

    >>> import torch, lfm_fast
    >>> centres = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    >>> classifier = lambda t, z: (1 - t)[:, None] * z @ centres.T
    >>> guidance = lfm_fast.guidance.ClassifierGuidance(classifier, 2.0)
    >>> z1, y = torch.zeros(2, 2), torch.tensor([0, 1])
    >>> z0 = lfm_fast.sample(lambda t, z, y=None: 0 * z, z1, y=y, guidance=guidance, method="heun", num_steps=10)
    >>> z0[:, 0] > 0
    tensor([ True, False])

    Source: Dhariwal and Nichol, arXiv 2105.05233, section 4; h from the velocity of a path, u = (alpha' / alpha) z +
    (sigma^2 alpha' / alpha - sigma sigma') score (Lipman et al., arXiv 2210.02747, section 4).
    """

    none = 0.0
    path = Linear()  # the integration's own once begun

    def __init__(self, classifier, scale=1.0, interval=(0.0, 1.0)):
        super().__init__(scale, interval)
        if not callable(classifier):
            raise ValueError(f"classifier is {describe(classifier)}, expected a module or function of (t, z).")
        self.classifier = classifier

    def begin(self, run):
        begun = super().begin(run)
        begun.path = run.path
        return begun

    def check(self, run):
        check_labels_given(run)

    def prepare(self, network, times):
        network.prepare(times, labelled=False)

    def __call__(self, network, t, z, time=None):
        scale, rows = self.scale(network.samples, t, z, time, network.times)
        push = None if scale is None else self._push(network, t, z, rows, scale)
        velocity = network.unconditional(t, z, time=time)
        if push is None:
            return velocity, None, None
        velocity = velocity.to(z.dtype)
        return velocity + push if rows is None else velocity.index_add(0, rows.index, push), None, None

    def _push(self, network, t, z, rows, scale):
        """- scale h grad log p(y | z_t) of the rows; None where it is 0 for all, as far as the host can see."""
        y = network.y
        if rows is not None:
            t, z, y, scale = (x[rows.index] for x in (t, z, y, scale))
        alpha, sigma, d_alpha, d_sigma = self.path.coefficients(t.double())
        blind = alpha < _NO_DATA
        if blind.device.type == "cpu" and bool(blind.all()):
            return None
        h = sigma * d_sigma - sigma.square() * d_alpha / alpha
        # not a factor of 0 there: a classifier may have no gradient, and 0 times NaN is NaN
        return torch.where(per_sample(blind, z).bool(), 0.0, per_sample(-scale * h, z) * self._gradient(t, z, y))

    def _gradient(self, t, z, y):
        """grad log p(y | z) (R, ...), whatever modes sampling runs in."""
        dtype = weight_type(self.classifier) or z.dtype
        with torch.inference_mode(False), torch.enable_grad():
            point = z.detach().to(dtype, copy=True).requires_grad_()
            logits = self.classifier(t.to(torch.promote_types(dtype, torch.float32), copy=True), point)
            _check_logits(logits, y)
            chosen = logits.float().log_softmax(1) if logits.dtype != torch.float64 else logits.log_softmax(1)
            chosen = chosen.gather(1, y.to(torch.int64, copy=True)[:, None]).sum()
            return torch.autograd.grad(chosen, point)[0].to(z.dtype)


def _check_logits(logits, y):
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or logits.shape[:1] != y.shape:
        raise ValueError(f"The classifier returned {describe(logits)}, expected logits ({len(y)}, K), floating.")
    if logits.ndim != 2:
        raise ValueError(f"The classifier returned logits {tuple(logits.shape)}, expected ({len(y)}, K).")
    if not logits.requires_grad:
        raise ValueError("The classifier's logits have no gradient; it has to be differentiable in z.")
    if y.device.type == "cpu" and int(y.max()) >= logits.shape[1]:
        raise ValueError(f"y holds the label {int(y.max())}, but the classifier knows {logits.shape[1]} classes.")
