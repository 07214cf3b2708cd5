"""group_norm_silu in Triton where channels lie innermost, and sums over more rows than one program adds up."""

import pytest
import torch
from compare import assert_close
from row_cases import ROWS, arguments_of, in_float64, outputs

from lfm_fast import ops
from lfm_fast.kernels.triton import group_norm_silu_backward as backward
from lfm_fast.kernels.triton._planes import Planes

NAMES = ["group_norm_silu", "group_norm_silu_backward"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 160, 9, 11), (2, 128, 8, 8), (1, 32, 17, 16)], ids=str)
def test_tiles_of_many_channels(name, shape):
    """Tiles with channels and positions left over, whole ones, and more than one of them."""
    case = {"shape": shape, "num_groups": 32, "layout": "channels_last", "dtype": torch.bfloat16}
    args = arguments_of(ROWS[name], case)
    with ops.use_backend("triton", ops=name):
        got = outputs(ROWS[name](*args))
    tolerance = ROWS[name].tolerance
    for g, w in zip(got, ROWS[name].reference(*in_float64(args)), strict=True):
        assert_close(g, w, absolute=tolerance.absolute, relative=tolerance.relative, what=f"{name} {shape}")


@pytest.mark.parametrize("count", [0, 1, backward.SPAN, backward.SPAN + 1, 5 * backward.SPAN - 3])
def test_rows_of_sums_are_added_in_spans(count):
    sums, products = torch.randn(2, max(count, 1), 21, generator=torch.Generator().manual_seed(0)).unbind(0)
    grad_bias, grad_weight = torch.full((21,), torch.nan), torch.full((21,), torch.nan)
    backward._add_up(sums, products, grad_bias, grad_weight, count)
    for got, rows in ((grad_bias, sums), (grad_weight, products)):
        want = rows[:count].double().sum(0)
        # as many roundings as there are terms to a lane, of sums below the sum of magnitudes
        assert_close(got, want, absolute=16 * 2.0**-24 * float(rows[:count].abs().sum(0).max()), what=f"{count} rows")


def test_a_tile_has_enough_positions_that_its_sums_are_few():
    x = torch.empty(2, 256, 32, 32).contiguous(memory_format=torch.channels_last)
    cut = Planes.of(x)
    assert cut.tile == {"P": 64, "C": 128}
    assert cut.piece == {"P": 16, "C": 128}
    assert (cut.chunks, cut.tiles, cut.pieces, cut.num_warps) == (16, 64, 256, 8)
    cut = Planes.of(x.contiguous())
    assert cut.tile == cut.piece == {"P": 1024, "C": 2}
    assert (cut.chunks, cut.tiles, cut.pieces, cut.num_warps) == (1, 256, 256, 4)
