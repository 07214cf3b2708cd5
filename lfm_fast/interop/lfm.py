"""LFM's own entry to sampling, under its signature, for scripts that were written for it."""

import torch
from torch import Tensor

from lfm_fast.flow.checks import describe
from lfm_fast.sampling import sample
from lfm_fast.solvers.external import EXTERNALS

_OURS = {"euler": "euler", "midpoint": "midpoint", "heun2": "heun"}  # torchdiffeq's name -> the same method of ours


def sample_from_model(model, x_0: Tensor, model_kwargs: dict, args) -> Tensor:
    """Integrate from x_0, which is NOISE (t = 1), to t = 0 with one of torchdiffeq's methods, as LFM's scripts do.

        result[0] = x_0,    result[-1] = latents, of dz/dt = model(t, z, **model_kwargs)

    The arguments and the result, (2, B, ...) as of torchdiffeq's odeint over the times [1, 0], are the reference's.

    Args:
        model: called model(t, z, y, ...), t (B,). Any field that `lfm_fast.sample` takes.
        x_0: (B, C, H, W) noise. Under guidance it may be doubled, (2 B, ...) with equal halves, as LFM's scripts pass
            it: then y is doubled too, labels and after them the null label, B states are integrated, and the result is
            doubled again.
        model_kwargs: {} or {"y": labels, "cfg_scale": number}, and further arguments of the model. Guidance is over all
            channels. Not doubled, the unconditional velocity is model(t, z, y=None).
        args: an object with `method`; with `atol` and `rtol` for an adaptive one (dopri5, dopri8, bosh3, fehlberg2,
            adaptive_heun), `step_size` for one of fixed steps (euler, midpoint, rk4, heun2, heun3), all three for
            explicit_adams and implicit_adams, whose step_size has to divide 1. `cfg_scale` counts where model_kwargs
            has none. Everything else, `num_steps` and `perturb` among it, is without effect, as num_steps is there;
            perturb moved times by one unit in their last place.

    Adaptive methods are torchdiffeq's own, one step size for the batch, as in the reference; fixed ones step from 1 by
    step_size, with a shorter last step. LFM's fixed-step sampler (num_steps points over [1, 1e-5]) is another thing:
    lfm_fast.sample(model, x_0, method="heun", num_steps=40, compat="lfm"), or method="lfm:heun40".

    Raises ValueError for what is missing or unknown, before the model is called.

    >>> from argparse import Namespace
    >>> args = Namespace(method="euler", step_size=0.25)
    >>> sample_from_model(lambda t, z: z, torch.ones(2, 4, 8, 8), {}, args)[-1].flatten()[0].item()  # (1 - 1/4)^4
    0.31640625

    Source: Dao et al., arXiv 2307.08698, section 3; torchdiffeq's documentation of odeint and step_size.
    """
    settings = _settings(args)
    kwargs = dict(_checked(model_kwargs))
    y, scale = kwargs.pop("y", None), _scale(kwargs, args)
    doubled = scale != 1 and _is_doubled(x_0, y)
    if doubled:
        x_0, y, settings["null_label"] = _halved(x_0, y, kwargs)
    elif scale != 1:
        settings["null_label"] = getattr(model, "null_label", None)
    z = sample(model, x_0, y=y, guidance_scale=scale, compat="lfm", model_kwargs=kwargs, **settings)
    states = torch.stack([x_0.to(z.dtype), z])
    return torch.cat([states, states], dim=1) if doubled else states


def _settings(args) -> dict:
    method = _attribute(args, "method")
    row = EXTERNALS.get(method) if isinstance(method, str) else None
    if row is None:
        raise ValueError(
            f"args.method is {method!r}, expected one of torchdiffeq's: {', '.join(EXTERNALS)}; LFM's fixed-step "
            "sampler is lfm_fast.sample(..., num_steps=N, compat='lfm')."
        )
    name = _OURS.get(method, f"torchdiffeq:{method}")
    settings = {"method": name}
    if row.kind != "fixed":  # implicit_adams solves its equation to these
        settings |= {"atol": _attribute(args, "atol"), "rtol": _attribute(args, "rtol")}
    if row.kind in ("fixed", "adams"):
        settings["time_grid"] = ("step", _attribute(args, "step_size"))
    return settings


def _attribute(args, name):
    if not hasattr(args, name):
        raise ValueError(f"args has no {name}, which sample_from_model reads: give an object with .{name}.")
    return getattr(args, name)


def _checked(model_kwargs):
    if not isinstance(model_kwargs, dict):
        raise ValueError(f"model_kwargs is {describe(model_kwargs)}, expected a dict such as dict(y=y, cfg_scale=1.5).")
    return model_kwargs


def _scale(kwargs, args):
    of_args = getattr(args, "cfg_scale", None)
    scale = kwargs.pop("cfg_scale", of_args)
    if of_args is not None and of_args not in (1, scale):
        raise ValueError(f"cfg_scale is {scale!r} in model_kwargs and {of_args!r} in args; give one of them.")
    return 1.0 if scale is None else scale


def _is_doubled(x_0, y):
    """Whether both halves of the noise are equal, which no two samples are, and labels stand for each."""
    if not (isinstance(x_0, Tensor) and isinstance(y, Tensor)) or len(x_0) != len(y) or len(x_0) % 2 or not len(x_0):
        return False
    return torch.equal(*x_0.chunk(2))


def _halved(x_0, y, kwargs):
    labels, null = y.chunk(2)
    if not bool((null == null[0]).all()):
        raise ValueError(f"y ends with the labels {null.unique().tolist()[:3]}, expected one null label for all.")
    if kwargs:
        raise ValueError(
            f"model_kwargs holds {', '.join(kwargs)} beside doubled labels, and which of its entries are doubled is "
            "not known; give x_0 and y once, and lfm_fast guides them."
        )
    return x_0.chunk(2)[0], labels, int(null[0])
