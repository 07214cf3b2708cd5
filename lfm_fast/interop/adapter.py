"""What the adapters of other projects' networks share: from their prediction, at their time, to our velocity.

An adapter is called as our models are, velocity (B, ...) = adapter(t, z, y=None, **model_kwargs), with t = 0 data and
t = 1 noise. What each project does otherwise is a few lines in its own module: how time runs, in which order a network
takes its arguments, what it predicts.
"""

import copy

import torch
from torch import Tensor, nn

from lfm_fast.flow.checks import check_velocity
from lfm_fast.flow.paths import Path
from lfm_fast.guidance.network import weight_type
from lfm_fast.models import DiT
from lfm_fast.models.recognise import dit_from_weights, require_same

PREDICTIONS = ("velocity", "noise", "data", "score", "v")
_HALF = (torch.bfloat16, torch.float16)
_OF_THE_NETWORK = ("config", "image_size", "in_channels", "out_channels", "num_classes", "num_labels")  # if it is ours
_SLACK = 1e-6  # times are rounded to float32 on the way


class Adapter(nn.Module):
    """Another project's network as a velocity field model(t, z, y=None, **model_kwargs).

    predicts: "velocity", or what the path turns into one: "noise" (z_1), "data" (z_0), "score" or "v" (alpha z_1 -
    sigma z_0). path: the path of z, which `lfm_fast.sample` takes from here. null_label: the label that
    y=None stands for; None where the network is then called without labels. learned_sigma: the network returns twice
    the channels, of which the second half is dropped.

    z is cast to the type of the network's weights for the network alone; all conversions are in at least float32.
    """

    casts = True  # lfm_fast.guidance's Network then leaves the state in its own type
    reverses = False  # whether their time runs from noise to data
    needs_labels = False  # whether the network is never called without labels

    def __init__(self, network, *, predicts="velocity", path=None, null_label=None, learned_sigma=False):
        super().__init__()
        if not callable(network):
            raise ValueError(f"network is a {type(network).__name__}, expected a module or function.")
        if not isinstance(predicts, str) or predicts not in PREDICTIONS:
            raise ValueError(f"predicts is {predicts!r}, expected one of {', '.join(PREDICTIONS)}.")
        if path is not None and not isinstance(path, Path):
            raise ValueError(f"path is {path!r}, expected an object of lfm_fast.paths such as Linear().")
        if path is None and predicts != "velocity":
            raise ValueError(
                f"A prediction of {predicts} is no velocity without the path it was trained on; give path."
            )
        if null_label is not None and (not isinstance(null_label, int) or isinstance(null_label, bool)):
            raise ValueError(f"null_label is {null_label!r}, expected a label (an integer) or None.")
        self.network, self.predicts, self.path, self.learned_sigma = network, predicts, path, learned_sigma
        if null_label is not None or self.needs_labels:  # as None it says that there is no velocity without a label
            self.null_label = null_label

    def __getattr__(self, name):
        return getattr(self.network, name) if name in _OF_THE_NETWORK else super().__getattr__(name)

    def forward(self, t: Tensor, z: Tensor, y: Tensor | None = None, **kwargs) -> Tensor:
        """Velocity (B, ...) of z (B, ...) at our times t (B,) or (), labels y (B,)."""
        t = t.expand(len(z))
        self.check_times(t, z)
        return self.velocity(self.predict(self.their_time(t), z, y, **kwargs), t, z)

    def their_time(self, t: Tensor) -> Tensor:
        """What the network calls our time t."""
        return 1 - t if self.reverses else t

    def call(self, z: Tensor, time: Tensor, y: Tensor | None, **kwargs):
        """The network's own call, (B,) times of its own in its own order of arguments."""
        raise NotImplementedError

    def predict(self, time: Tensor, z: Tensor, y: Tensor | None = None, **kwargs) -> Tensor:
        """What the network predicts (B, ...) at its own times (B,), the channels of learned sigmas dropped."""
        dtype = weight_type(self.network) or z.dtype
        time = time.to(torch.float32 if dtype in _HALF else dtype)
        y = self._labels(y, z)
        if isinstance(self.network, DiT):  # ours with their weights: it takes our order, and has dropped its sigmas
            return self.network(time, z.to(dtype), y)
        output = self.call(z.to(dtype), time, y, **kwargs)
        double = isinstance(output, Tensor) and output.ndim == z.ndim and output.shape[1] == 2 * z.shape[1]
        if double and not self.learned_sigma:
            raise ValueError(
                f"The network returned {output.shape[1]} channels for {z.shape[1]}; if the second half are learned "
                "sigmas, give learned_sigma=True to drop them."
            )
        output = output[:, : z.shape[1]] if double else output
        check_velocity(output, z)
        return output

    def _labels(self, y, z):
        null_label = getattr(self, "null_label", None)
        if y is None and null_label is not None:
            return torch.full((len(z),), null_label, device=z.device)
        if y is None and self.needs_labels:
            raise ValueError(
                f"{type(self).__name__} was called without labels and has no null_label to stand for them; give "
                "null_label, the row of the label table that means 'no label' (0 for a network with one class)."
            )
        return y

    def velocity(self, prediction: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Our velocity, of what the network predicted at our times t (B,)."""
        if self.predicts == "velocity":
            return -prediction if self.reverses else prediction
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        prediction = prediction.to(z.dtype)
        if self.predicts != "v":
            return getattr(self.path, f"velocity_from_{self.predicts}")(prediction, z, t)
        coefficients = self.path.coefficients(t.to(torch.float64)).to(z.dtype)
        alpha, sigma, d_alpha, d_sigma = coefficients.reshape(4, -1, *[1] * (z.ndim - 1))
        length = alpha**2 + sigma**2  # (z, v) is (z_0, z_1) turned and stretched
        data, noise = (alpha * z - sigma * prediction) / length, (sigma * z + alpha * prediction) / length
        return d_alpha * data + d_sigma * noise

    def check_times(self, t: Tensor, z: Tensor) -> None:
        """Raise ValueError where a prediction cannot be turned into a velocity; looks at values on the CPU only."""
        if self.predicts == "velocity" or t.device.type != "cpu":
            return
        low, high = self.path.t_min, self.path.t_max
        if float(t.min()) < low - _SLACK or float(t.max()) > high + _SLACK:
            raise ValueError(
                f"t runs from {t.min():g} to {t.max():g}, but the path of this network is known in [{low:g}, {high:g}] "
                "only, as lfm_fast.sample knows from the adapter's path."
            )
        if self.predicts == "v":
            return
        name, argument = ("sigma", "t_end") if self.predicts == "data" else ("alpha", "t_start")
        divisor = getattr(self.path, name)(t.to(torch.float64)).min()
        if float(divisor) < 1e3 * torch.finfo(torch.promote_types(z.dtype, torch.float32)).eps:
            raise ValueError(
                f"The velocity of predicted {self.predicts} is divided by {name}, which is {divisor:g} at one of these "
                f"times; give lfm_fast.sample a {argument} further inside, 1e-3 from the end."
            )

    @property
    def prepares(self) -> bool:
        """Whether `prepare` may stand for calls: where the network is ours, and says so."""
        return isinstance(self.network, DiT) and self.network.prepares

    def prepare(self, times: Tensor, y: Tensor | None = None, *, unlabelled: bool = False):
        """The sampling form at our times (N,), as of DiT.prepare: prepared(k, z, y) = adapter(times[k], z, y)."""
        return _Prepared(self, times, y, unlabelled)

    def as_dit(self) -> DiT:
        """The network as our DiT, with a copy of its weights, once the two were seen to compute the same.

        Raises ValueError for a network whose weights are not a DiT's, or that computes something else with them.
        """
        if isinstance(self.network, DiT):
            return self.network
        if not isinstance(self.network, nn.Module):
            raise ValueError(f"a {type(self.network).__name__} has no weights to be recognised by; give a module.")
        ours = dit_from_weights(*self.weights())
        converted = self.around(ours)
        require_same(ours, self.network, self.predict, converted.predict)
        return ours

    def weights(self) -> tuple[dict, int | None]:
        """The network's weights under the names of our DiT, and its number of heads if it tells."""
        heads = getattr(self.network, "num_heads", None)
        return self.network.state_dict(), heads if isinstance(heads, int) else None

    def around(self, network) -> "Adapter":
        """This adapter about another network."""
        other = copy.copy(self)
        other._modules = {name: module for name, module in self._modules.items() if name != "network"}
        other.network = network
        return other


class _Prepared:
    """The sampling form of an adapter about our DiT."""

    def __init__(self, adapter, times, y, unlabelled):
        self.adapter, self.times = adapter, times
        self.dtype = weight_type(adapter.network)
        theirs = adapter.their_time(times).to(torch.float32 if self.dtype in _HALF else self.dtype)
        y, unlabelled = self._named(y, unlabelled)
        self.network = adapter.network.prepare(theirs, y, unlabelled=unlabelled)

    def relabel(self, y, unlabelled, distinct=True):
        """Prepare for other labels: see lfm_fast.models.prepared."""
        self.network.relabel(*self._named(y, unlabelled), distinct)

    def _named(self, y, unlabelled):
        """What y=None stands for is a label like others, where there is one."""
        null = getattr(self.adapter, "null_label", None)
        if not unlabelled or null is None:
            return y, unlabelled
        null = torch.full((1,), null, device=self.times.device)
        return null if y is None else torch.cat([y, null.to(y.dtype)]), False

    def __call__(self, k, z, y=None, samples=None):
        count = len(z) if samples is None else len(samples)
        t = self.times[k : k + 1].expand(count)
        self.adapter.check_times(t, z)
        rows = z if samples is None else z.index_select(0, samples)
        prediction = self.network(k, z.to(self.dtype), self.adapter._labels(y, rows), samples)
        return self.adapter.velocity(prediction, t, rows)
