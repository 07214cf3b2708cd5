"""Keys and shapes of a network's weights, and how those of two networks differ."""

Shapes = dict[str, tuple[int, ...]]


def shapes_of(state_dict: dict) -> Shapes:
    """Key -> shape of every tensor of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in state_dict.items()}


def differences(expected: Shapes, given: Shapes, limit: int = 3) -> str:
    """Say in which keys and shapes `given` differs from `expected`, at most `limit` of a kind; "" when in none."""
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    reshaped = [
        f"{name} is {given[name]} and should be {shape}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    return "; ".join(f"{kind}: {capped(names, limit)}" for kind, names in kinds if names)


def how_many_differ(expected: Shapes, given: Shapes) -> int:
    """Number of keys that only one of the two has, or each with another shape."""
    return sum(expected.get(key) != given.get(key) for key in expected.keys() | given.keys())


def capped(names: list[str], limit: int) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
