"""A network begins as another one, trained before, that saw less: it computes the same until it has learned more."""

import torch
from torch import nn

from lfm_fast.models.conditioned import Conditioned


@torch.no_grad()
def inherit(model: nn.Module, other: nn.Module) -> None:
    """Give `model` the weights of `other`, a network of the same sizes but for a condition or labels.

    Input channels that `other` has not, those of a condition, begin at zero; a model without labels takes what `other`
    does without a label. So both give one velocity at first, whatever the condition. Of a `Conditioned` the network
    inherits, and the encoder stays as it is.

    Raises ValueError where the two do not match, or `other` knows no "no label"; `model` is then as it was.

    >>> from lfm_fast.models import create_model
    >>> sizes = {"image_size": 16, "downsampling": 1}
    >>> plain = create_model("DiT-Emoji/4", num_classes=3, label_dropout=0.1, **sizes)
    >>> inherit(create_model("DiT-Emoji/4", in_channels=9, out_channels=4, **sizes), plain)

    Source: Brooks et al. (InstructPix2Pix), arXiv 2211.09800, section 3.2: weights of added channels begin at zero.
    """
    model = model.network if isinstance(model, Conditioned) else model
    own, given = model.state_dict(), other.state_dict()
    if type(model) is not type(other) or set(own) != set(given):
        raise ValueError(
            f"a {type(model).__name__} cannot begin as this {type(other).__name__}: they have other weights; "
            "choose the same kind and size of network"
        )
    fitted = {name: _fitted(name, tensor, given[name], model, other) for name, tensor in own.items()}
    model.load_state_dict(fitted)


def _fitted(name, own, given, model, other):
    given = given.to(own)
    if own.shape == given.shape:
        return given
    if _is_of_inputs(own, given, model, other):
        wider = torch.zeros_like(own)
        wider[:, : given.shape[1]] = given
        return wider
    if own.ndim == 2 and own.shape[1:] == given.shape[1:] and len(given) == other.num_labels and not model.num_classes:
        if other.null_label is None:
            raise ValueError("the flow to begin with was trained without label dropout: it needs a label; give labels")
        return given[other.null_label : other.null_label + 1]
    raise ValueError(
        f"{name} is {tuple(own.shape)} here and {tuple(given.shape)} in the flow to begin with; choose the same "
        "network and the same labels"
    )


def _is_of_inputs(own, given, model, other):
    """Whether these are the weights of the first convolution, of a model with more input channels."""
    more = (own.shape[1], given.shape[1]) == (model.in_channels, other.in_channels) if own.ndim == 4 else False
    return more and own.shape[1] > given.shape[1] and (own.shape[0], *own.shape[2:]) == (len(given), *given.shape[2:])
