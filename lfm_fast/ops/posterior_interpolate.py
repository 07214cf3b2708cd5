"""posterior_interpolate: rows of a table of posteriors gathered, sampled and interpolated in one pass."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lfm_fast.ops._cases import SHAPES, indices, numbers, per_sample
from lfm_fast.ops._checks import (
    INTEGER,
    VELOCITY,
    check_counter,
    check_like,
    check_per_sample,
    check_state,
    check_tensor,
    flat,
    numel_per_sample,
    refuse_float64,
)
from lfm_fast.ops._registry import Backend, Op, Tolerance, cuda_backend, inside_transform, register
from lfm_fast.ops._triton import triton_backend
from lfm_fast.ops.philox_normal import reference as normal_reference
from lfm_fast.ops.streams import STREAM_NOISE, STREAM_POSTERIOR


def reference(mean, rows, index, coefficients, log_variance=None, seed=0):
    dtype = torch.promote_types(mean.dtype, torch.float32)

    def picked(table):  # index_select: a negative row is an error, and not one from the end
        return flat(table.index_select(0, rows)).to(dtype)

    def normals(data, stream):
        return normal_reference(index, data.shape[1], seed, stream).to(dtype)

    data = picked(mean)
    if log_variance is not None:
        data = data + torch.exp(picked(log_variance) / 2) * normals(data, STREAM_POSTERIOR)
    noise = normals(data, STREAM_NOISE)
    alpha, sigma, d_alpha, d_sigma = coefficients[:, :, None].unbind(0)
    shape = (rows.shape[0], *mean.shape[1:])
    z_t, target = alpha * data + sigma * noise, d_alpha * data + d_sigma * noise
    return z_t.contiguous().view(shape), target.contiguous().view(shape)


def _check(mean, rows, index, coefficients, log_variance=None, seed=0) -> None:
    check_state("mean", mean, VELOCITY)
    check_tensor("rows", rows, INTEGER)
    if rows.dim() != 1 or rows.device != mean.device:
        raise ValueError(
            f"rows is {tuple(rows.shape)} on {rows.device}, expected (B,) on {mean.device}: one row of mean per sample."
        )
    check_per_sample("index", index, tuple(rows.shape), "rows", rows, INTEGER)
    check_per_sample("coefficients", coefficients, (4, rows.shape[0]), "mean", mean)
    if log_variance is not None:
        check_like("log_variance", log_variance, "mean", mean, (mean.dtype,))
    check_counter(numel_per_sample(mean), seed)
    _check_values(rows, mean.shape[0])


def _check_values(rows: Tensor, items: int) -> None:
    """Where looking at them waits for nobody; a kernel on a GPU writes NaN for a row that is not there."""
    if rows.device.type != "cpu" or not rows.numel() or isinstance(rows, FakeTensor):
        return
    if torch.compiler.is_compiling() or inside_transform():
        return
    least, most = (int(x) for x in torch.aminmax(rows))
    if least < 0 or most >= items:
        there = f"rows 0 to {items - 1}: pass some of these" if items else "no row: pass a table of one or more"
        raise ValueError(f"rows goes from {least} to {most}, but mean has {there}.")


def _arguments(*, shape, variance=True, device="cpu", dtype=torch.float32, layout="contiguous") -> dict:
    """As many items as samples, so that one may be shown alone; other tables are in tests of their own."""
    batch = shape[0]
    table = {"device": device, "dtype": dtype, "layout": layout}
    state = torch.float64 if dtype is torch.float64 else torch.float32
    return {
        "mean": numbers(shape, 1, **table),
        "rows": (torch.arange(batch, device=device) * 2 + 1) % max(batch, 1),
        "index": indices(batch, device),
        "coefficients": per_sample((4, batch), 2, device=device, dtype=state),
        "log_variance": numbers(shape, 3, **table) if variance else None,
        "seed": 1234567890123,
    }


def _cost(mean, rows, index, coefficients, log_variance=None, seed=0) -> tuple[int, int]:
    size = rows.shape[0] * numel_per_sample(mean)
    tables = 1 if log_variance is None else 2
    return size * (tables * mean.element_size() + 8), size * (45 if log_variance is None else 108)


def _why_not(mean, *args) -> str | None:
    return refuse_float64(mean)  # float64 elsewhere needs a float64 mean


_row = register(
    Op(
        name="posterior_interpolate",
        schema=(
            "(Tensor mean, Tensor rows, Tensor index, Tensor coefficients, Tensor? log_variance=None, int seed=0)"
            " -> (Tensor z_t, Tensor target)"
        ),
        reference=reference,
        check=_check,
        not_differentiable=("mean", "coefficients", "log_variance"),
        shared=("mean", "log_variance"),
        backends=(
            Backend(name="cpp", devices=("cpu",), why_not=_why_not),
            cuda_backend(_why_not),
            triton_backend("posterior_interpolate", _why_not),
        ),
        arguments=_arguments,
        cases=(
            {"shape": (3, 4, 5, 7)},
            *({"shape": shape, "variance": variance} for shape in SHAPES for variance in (True, False)),
            *({"shape": (3, 4, 5, 7), "dtype": d} for d in (torch.bfloat16, torch.float16, torch.float64)),
            {"shape": (2, 4, 96, 96), "dtype": torch.bfloat16},
            {"shape": (5, 129), "dtype": torch.float16, "variance": False},
            *({"shape": (3, 4, 5, 6), "layout": x} for x in ("transposed", "channels_last", "sliced", "expanded")),
            {"shape": (3, 4, 5, 6), "layout": "sliced", "dtype": torch.bfloat16},
        ),
        sizes=tuple({"shape": (b, 4, 32, 32), "dtype": d} for b in (64, 1024) for d in (torch.float32, torch.bfloat16)),
        cost=_cost,
        tolerance=Tolerance(
            absolute=2e-5,
            relative=1e-6,
            origin="exp of half a log-variance below 5, whose argument has been rounded: 5 units of 2^-24, and two more"
            " roundings, of a draw below 5 e^2.5; times a coefficient below 4; and 3 roundings of the sum",
        ),
    )
)


def posterior_interpolate(
    mean: Tensor,
    rows: Tensor,
    index: Tensor,
    coefficients: Tensor,
    log_variance: Tensor | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Training's point z_t and its velocity target from a table of posteriors, with neither z_0 nor noise written.

        z_0    = mean[rows] + exp(log_variance[rows] / 2) n_2
        z_t    = alpha z_0 + sigma n_0,    target = d_alpha z_0 + d_sigma n_0

    n_2 and n_0 are `philox_normal` of the samples' numbers, of the streams of the posterior and of the noise.

    Args:
        mean: (N, ...) one posterior's mean per item, float32, bfloat16, float16 or float64.
        rows: (B,) int64, the item of each sample, 0 to N - 1. Looked at on the CPU; on a GPU a sample of another row is
            NaN.
        index: (B,) int64, the samples' numbers.
        coefficients: (4, B), the rows alpha, sigma and their time derivatives d_alpha, d_sigma at each sample's t.
        log_variance: (N, ...) as mean; or None, and z_0 = mean[rows].
        seed: of both noises.

    Returns:
        z_t and target, each (B, ...) contiguous float32 (float64 for float64). There is no gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, rows that there are not, or a gradient is asked for.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> table, t = torch.tensor([[1.0], [4.0]]), torch.tensor([0.0, 0.0])
        >>> straight = torch.stack((1 - t, t, -torch.ones(2), 0 * t))  # at t = 0: z_t is the data itself
        >>> ops.posterior_interpolate(table, torch.tensor([1, 1]), torch.arange(2), straight)
        (tensor([[4.],
                [4.]]), tensor([[-4.],
                [-4.]]))

    Source: Kingma and Welling 2014 (arXiv 1312.6114), equation 10; Lipman et al. 2023 (arXiv 2210.02747), equations 10
    to 15.
    """
    return _row(mean, rows, index, coefficients, log_variance, seed)
