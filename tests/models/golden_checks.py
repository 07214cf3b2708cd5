"""Bounds of what the reference computed, and how far a result is from it."""

# The stored outputs are float32: their own rounding is up to 1e-6 here (guided, scale 4: 2.3e-6). A wrong epsilon, the
# smallest mistake tried, is off by more than these bounds.
UNGUIDED, GUIDED = 2.5e-6, 5e-6
FLOAT32 = 1e-5  # a float32 evaluation against the float64 one; measured 1e-6


def relative_error(found, expected):
    """The largest difference, in units of the largest magnitude."""
    expected = expected.double()
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()
