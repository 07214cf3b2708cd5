"""What training and sampling ask of a model, its arguments and its velocity; each is a ValueError of one sentence.

Values are read only where that waits for no device: on the CPU.
"""

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_model(model, model_kwargs):
    """Raise ValueError unless `model` can be called and model_kwargs is None or a dict of further arguments."""
    if not callable(model):
        raise ValueError(
            f"model is {type(model).__name__!r}, expected a module or function called as model(t, z, y=None)."
        )
    if model_kwargs is None:
        return
    if not isinstance(model_kwargs, dict):
        raise ValueError(f"model_kwargs is {type(model_kwargs).__name__!r}, expected a dict of keyword arguments.")
    for name in model_kwargs:
        if not isinstance(name, str):
            raise ValueError(f"model_kwargs holds the key {name!r}, expected names of arguments as strings.")
        if name in ("t", "z", "y"):
            raise ValueError(f"model_kwargs holds {name}, which the model gets anyway; give labels as y=.")


def check_labels(y, batch_size):
    """Raise ValueError unless y is (B,) integers from 0 on."""
    if not isinstance(y, torch.Tensor) or y.dtype not in _INTEGERS or y.shape != (batch_size,):
        raise ValueError(f"y is {describe(y)}, expected ({batch_size},) integer labels.")
    if y.device.type == "cpu" and batch_size and int(y.min()) < 0:
        raise ValueError(f"y holds the label {int(y.min())}, expected labels from 0 on.")


def check_velocity(velocity, z):
    """Raise ValueError unless a model's result is a velocity for z (B, ...): a real floating tensor of its shape."""
    if not isinstance(velocity, torch.Tensor):
        wrapped = isinstance(velocity, (tuple, list, dict)) or hasattr(velocity, "sample")
        hint = "; wrap the model in a function that returns the velocity alone" if wrapped else ""
        raise ValueError(f"The model returned {type(velocity).__name__!r}, expected a tensor, the velocity{hint}.")
    if not velocity.is_floating_point():
        raise ValueError(f"The model returned a velocity of {velocity.dtype}, expected a real floating type.")
    if velocity.shape != z.shape:
        raise ValueError(
            f"The model returned a velocity {tuple(velocity.shape)} for a state {tuple(z.shape)}, expected its shape."
        )


def check_times(t, batch_size, low, high, source="t"):
    """Raise ValueError unless t is (B,) floating, and within [low, high] where its values can be read."""
    if not isinstance(t, torch.Tensor) or not t.is_floating_point() or t.shape != (batch_size,):
        raise ValueError(f"{source} is {describe(t)}, expected ({batch_size},) floating: one time per sample.")
    if t.device.type == "cpu" and not bool(((t >= low) & (t <= high)).all()):  # NaN is outside too
        raise ValueError(f"{source} holds times outside [{low:g}, {high:g}] or NaN, expected times inside.")


def describe(value):
    """A tensor's shape and type, or the type of anything else, for a message."""
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(type(value).__name__)
