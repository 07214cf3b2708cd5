"""What every network here has in common: how it is called, and what it refuses."""

import torch
from torch import Tensor, nn


class VelocityNetwork(nn.Module):
    """A network called model(t, z, y=None, condition=None) that returns the velocity (B, out_channels, H, W).

    A condition in latent resolution, (B, K, H, W), is put behind the latents z (B, C, H, W) channel by channel, with
    C = out_channels and C + K = in_channels: the masked image and its mask in inpainting, an encoded label map. Without
    one, z holds all in_channels itself.

    Attributes:
        config: from which `from_config` rebuilds the network; `family` among it.
        image_size: side of the LATENT.
        in_channels, out_channels: of all that comes in, and of the velocity.
        num_classes: labels it knows, 0 for none.
        num_labels: rows it has for them, with one that means "no label" or without; at least 1.
        sample_arguments: names of the keyword arguments that hold one entry per sample, so that guidance and adaptive
            steps may leave out or repeat rows.
    """

    family: str
    sample_arguments = ("condition",)
    condition_argument = "condition"  # or another of `sample_arguments`: what the network cannot do without
    activation_checkpointing = "none"  # or another of checkpointing.MODES: what training keeps for its backward pass
    prepares = False  # whether `prepare` gives a sampling form, as that of a DiT

    def __init__(self, config: dict):
        super().__init__()
        if config.get("out_channels", 0) in (None, config["in_channels"]):
            del config["out_channels"]  # a configuration is as it was before there were conditions
        self.config = {"family": self.family, **config}
        self.image_size, self.in_channels = config["image_size"], config["in_channels"]
        self.out_channels = config.get("out_channels", self.in_channels)
        self.num_classes = config["num_classes"]
        self.num_labels = max(self.num_classes + (config["label_dropout"] > 0), 1)

    @property
    def null_label(self) -> int | None:
        """The label that means "no label", or None for a labelled network built without label dropout."""
        if self.num_classes and self.num_labels == self.num_classes:
            return None
        return self.num_classes

    @property
    def needs_condition(self) -> bool:
        """Whether it is called with a condition."""
        return self.in_channels != self.out_channels

    def check_inputs(self, t: Tensor, z: Tensor, y: Tensor | None) -> None:
        """Raise ValueError unless there is one time, (B,) or (), and one label, (B,), for each latent of z."""
        require_tensors(t=t)
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] != z.shape[0]):
            raise ValueError(f"t must have shape ({z.shape[0]},), one time per sample of z, but is {tuple(t.shape)}.")
        if y is not None:
            self.check_labels(y, z.shape[0])

    def joined(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """z (B, C, H, W) with the condition (B, K, H, W) behind it: (B, in_channels, H, W).

        Raises ValueError for other channels or sides than this network's, and for another number of conditions.
        """
        sides = (self.image_size, self.image_size)
        require_tensors(z=z, condition=condition)
        if condition is None:
            self._check_planes("latents of shape", "z", z, (self.in_channels, *sides))
            return z
        if self.in_channels == self.out_channels:
            raise ValueError("this network takes no condition; leave condition out.")
        self._check_planes("latents of shape", "z", z, (self.out_channels, *sides))
        self._check_planes("a condition", "condition", condition, (self.in_channels - self.out_channels, *sides))
        if condition.shape[0] != z.shape[0]:
            raise ValueError(f"condition holds {condition.shape[0]} entries for {z.shape[0]} samples of z.")
        return torch.cat([z, condition.to(z)], dim=1)

    def _check_planes(self, what: str, name: str, x: Tensor, expected: tuple[int, ...]) -> None:
        if x.ndim == 4 and tuple(x.shape[1:]) == expected:
            return
        hint = "resize the latents or build the network for their size"
        if x.ndim == 4 and x.shape[1] == self.out_channels < expected[0]:
            hint = f"give the other {expected[0] - self.out_channels} channels as condition"
        raise ValueError(
            f"this network takes {what} (B, {', '.join(map(str, expected))}), but {name} is {tuple(x.shape)}; {hint}."
        )

    def check_labels(self, y: Tensor, count: int) -> None:
        """Raise ValueError unless y is (count,) integer labels of this network; values are read on the CPU only."""
        require_tensors(y=y)
        if y.ndim != 1 or y.shape[0] != count or y.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"y must be integer labels of shape ({count},), one per sample of z, but is {y.dtype} {tuple(y.shape)}."
            )
        # On a GPU this comparison would wait for the device; there the table look-up itself asserts.
        if not torch.compiler.is_compiling() and y.device.type == "cpu" and y.numel():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= self.num_labels:
                raise ValueError(
                    f"labels must lie in 0..{self.num_labels - 1}, but y holds {low if low < 0 else high}; "
                    f"this network knows {self.num_classes} classes."
                )


def require_tensors(**given: Tensor | None) -> None:
    """Raise ValueError for what is neither a tensor nor None."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, but is a {type(value).__name__}.")


def check_channels(config: dict) -> None:
    """Raise ValueError unless the channels of a configuration are counts, and no more come out than in."""
    for name in ("image_size", "in_channels"):
        require_count(name, config[name])
    out_channels = config.get("out_channels")
    if out_channels is not None:
        require_count("out_channels", out_channels)
        if out_channels > config["in_channels"]:
            raise ValueError(
                f"out_channels {out_channels} must not exceed in_channels {config['in_channels']}, which are the "
                "latent's and its condition's."
            )


def check_label_sizes(num_classes, label_dropout) -> None:
    """Raise ValueError unless these are a number of classes and a share of samples whose label is dropped."""
    if not is_count(num_classes) or num_classes < 0:
        raise ValueError(f"num_classes must be 0 (unlabelled) or a positive integer, but is {num_classes!r}.")
    if not is_share(label_dropout):
        raise ValueError(f"label_dropout must lie in [0, 1), but is {label_dropout!r}.")
    if label_dropout and not num_classes:
        raise ValueError(f"label_dropout {label_dropout} needs labels to drop, but num_classes is 0.")


def require_count(name: str, value) -> None:
    """Raise ValueError unless the value is an integer from 1 on."""
    if not is_count(value) or value < 1:
        raise ValueError(f"{name} must be a positive integer, but is {value!r}.")


def is_count(value) -> bool:
    """An int, and not True or False, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_share(value) -> bool:
    """A number in [0, 1)."""
    return (isinstance(value, float) or is_count(value)) and 0 <= value < 1
