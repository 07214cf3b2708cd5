"""Which backend would run an op, and why each other would not, in sentences."""

from dataclasses import dataclass

from lfm_fast.ops._registry import Op, row, rows


@dataclass(frozen=True)
class Explanation:
    """Which backend would run an op, and the reason of each that would not."""

    op: str
    backend: str
    refused: dict[str, str]

    def __str__(self) -> str:
        reasons = [f"  not {name}: {reason}." for name, reason in self.refused.items()]
        return "\n".join([f"{self.op} runs on {self.backend}.", *reasons])


def explain(op=None, *args, **kwargs):
    """Say which backend would run `op` with these arguments, and why each other would not.

    Args:
        op: a public function of `lfm_fast.ops` or its name; None describes every row.
        args, kwargs: the op's arguments. Without any, only what holds for every CPU call is said.

    Returns:
        An `Explanation` (`.backend`, `.refused`; prints as sentences), or with op=None one string for all rows.

    Raises:
        ValueError: unknown op, or arguments the op itself would refuse.

    Example:
        >>> import torch
        >>> from lfm_fast import ops
        >>> with ops.use_backend("reference"):
        ...     print(ops.explain("philox_normal", torch.arange(2), 8, seed=0).backend)
        reference
    """
    if op is None:
        return "\n".join(str(explain(r)) for r in rows().values())
    r = op if isinstance(op, Op) else row(op)
    if args or kwargs:
        values = r.bind(*args, **kwargs)
        values = values if r.prepare is None else r.prepare(values)
        r.check(*values)
    else:
        values = r.bind(**r.arguments(**r.cases[0]))
    chosen = r.choose(values)
    slower = {} if r.rank is None else r.rank(r, values)[1]
    others = [b for b in r.backends if b.name != chosen]
    reasons = {b.name: slower.get(b.name) or b.refusal(values) or f"{chosen} comes first" for b in others}
    return Explanation(r.name, chosen, reasons)
