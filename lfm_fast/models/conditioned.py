"""A network together with the encoder of what it is conditioned on."""

import torch
from torch import Tensor, nn

from lfm_fast.models.box_encoder import BoxEncoder
from lfm_fast.models.label_map_encoder import LabelMapEncoder
from lfm_fast.models.velocity_network import VelocityNetwork

# kind -> class: an encoder is a module encoder(raw) -> tensor with the class attributes `kind` and `argument`, the name
# of the network's argument that its result is (or a dict of several); with `config`, a dict of its own keyword
# arguments; and with `check(raw, count)`, which raises ValueError, in one sentence, for what it cannot encode for
# `count` samples
ENCODERS: dict[str, type[nn.Module]] = {encoder.kind: encoder for encoder in (BoxEncoder, LabelMapEncoder)}


class Conditioned(VelocityNetwork):
    """A velocity network whose condition is made by an encoder that is trained with it.

        v(t, z, y, condition) = network(t, z, y, argument=encoder(condition))

    Args:
        network: any network of `create_model` that takes what the encoder makes.
        encoder: one of `ENCODERS`: of a label map to `condition`, of boxes to `context`.

    In a loop that knows the condition beforehand, encode it once and call the network: `parts(condition)`.

    Source: Rombach et al. 2022, arXiv 2112.10752, section 3.3, with a learned encoder per kind of condition.
    """

    family = "conditioned"

    def __init__(self, *, network: nn.Module | dict, encoder: nn.Module | dict):
        from lfm_fast.models.registry import from_config  # which builds conditioned networks too

        network = from_config(network) if isinstance(network, dict) else network
        encoder = encoder_from_config(encoder) if isinstance(encoder, dict) else encoder
        if encoder.argument not in network.sample_arguments:
            raise ValueError(
                f"the encoder {encoder.kind} makes a {encoder.argument}, which {type(network).__name__} does not take."
            )
        super().__init__({**network.config, "family": self.family})
        self.config = {"family": self.family, "network": network.config}
        self.config |= {"encoder": {"kind": encoder.kind, **encoder.config}}
        self.num_labels = network.num_labels
        self.network, self.encoder = network, encoder

    @property
    def null_label(self) -> int | None:
        """The network's label that means "no label", or None."""
        return self.network.null_label

    def forward(self, t: Tensor, z: Tensor, y: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Velocity (B, C, H, W) at times t (B,), latents z, labels y and what the encoder takes, one for each."""
        if condition is None:
            raise ValueError(f"this network is conditioned on {self.encoder.kind}; give condition.")
        return self.network(t, z, y, **self._encoded(condition))

    needs_condition = True

    @torch.no_grad()
    def parts(self, condition: Tensor) -> tuple[nn.Module, dict[str, Tensor]]:
        """The network, and the arguments that the encoded condition makes: model(t, z, y) = network(t, z, y, **it)."""
        return self.network, self._encoded(condition)

    def _encoded(self, condition: Tensor) -> dict[str, Tensor]:
        made = self.encoder(condition)
        return made if isinstance(made, dict) else {self.encoder.argument: made}

    def initialise(self) -> None:
        """Draw fresh weights of the network; the encoder keeps its own."""
        self.network.initialise()

    def compile(self, *args, **options) -> None:
        """Compile the network in place; the encoder runs as it is."""
        self.network.compile(*args, **options)

    def flops_per_sample(self) -> int:
        """Floating-point operations of the network's forward on one sample; the encoder's are next to none."""
        return self.network.flops_per_sample()

    @property
    def activation_checkpointing(self) -> str:
        return self.network.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, mode: str) -> None:
        self.network.activation_checkpointing = mode


def taken_apart(model: nn.Module, condition: Tensor | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """(network, arguments) to call in a loop in place of model(t, z, y, condition): what is encoded is so once."""
    if condition is None:
        return model, {}
    if isinstance(model, Conditioned):
        return model.parts(condition)
    return model, {model.condition_argument: condition}


def encoder_from_config(config: dict) -> nn.Module:
    """Rebuild an encoder, with fresh weights, from its `kind` and keyword arguments."""
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    if kind not in ENCODERS:
        raise ValueError(f"there is no encoder {kind!r}; there is {', '.join(sorted(ENCODERS)) or 'none'}.")
    return ENCODERS[kind](**arguments)
