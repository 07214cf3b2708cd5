"""Comparison of tensors whose failure says where, how far off the worst pair is, and which share fails."""

import torch


def assert_close(got, want, *, absolute=0.0, relative=0.0, what="result"):
    """|got - want| <= absolute + relative |want|, plus half a unit in the last place where got is a 16-bit float.

    want is taken in float64. NaN matches NaN only, an infinity only the same infinity.
    """
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    if got.dtype in (torch.bfloat16, torch.float16):
        relative = relative + torch.finfo(got.dtype).eps / 2
    exact, computed = want.detach().double(), got.detach().double()
    difference = (computed - exact).abs()
    allowed = absolute + relative * exact.abs()
    same = (computed == exact) | (computed.isnan() & exact.isnan())
    fails = ~(same | (difference <= allowed))
    fails |= ~same & exact.isinf()  # an infinite expectation allows an infinite error
    _report(what, computed, exact, difference - allowed, fails)


def assert_same_bits(got, want, what="result"):
    """Equal to the last bit; 0 and -0 differ, and NaN equals NaN of the same bits."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), f"{what}: {got.shape} {got.dtype}, expected {want.shape}"
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[got.element_size()]
    fails = got.detach().contiguous().view(integer) != want.detach().contiguous().view(integer)
    computed, exact = got.detach().double(), want.detach().double()
    _report(what, computed, exact, (computed - exact).abs(), fails)


def _report(what, computed, exact, excess, fails):
    if not fails.any():
        return
    # NaN has no size: any pair with one counts as the worst
    order = torch.where(fails, excess.nan_to_num(nan=torch.inf), -torch.inf).flatten()
    place = tuple(int(i) for i in torch.unravel_index(order.argmax(), fails.shape))
    share = fails.double().mean().item()
    raise AssertionError(
        f"{what}: {int(fails.sum())} of {fails.numel()} elements ({share:.2%}) differ; worst at {place}: "
        f"got {computed[place].item()!r}, expected {exact[place].item()!r}, "
        f"off by {(computed[place] - exact[place]).abs().item():.3e}"
    )
