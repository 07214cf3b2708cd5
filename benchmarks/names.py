"""What the contenders are called, in tables and result files."""

FAST, AGAIN, REFERENCE = "fast path", "fast path, again", "reference path"
EAGER = "PyTorch eager"
COMPILED, FAST_COMPILED = "torch.compile", "fast path + torch.compile"
DIFFUSERS, DIFFUSERS_COMPILED = "diffusers", "diffusers + torch.compile"

ONEDNN = "oneDNN, packed"
DATA_LOADER = "torch DataLoader"
COPY = "copy of as many bytes"  # half of them read, half written

FIXED = ("euler", "midpoint", "heun", "rk4", "ab2", "ab3", "abm5", "dpmpp_2m", "unipc")  # solvers
ADAPTIVE = ("dopri5", "dopri8", "bosh3", "adaptive_heun", "tsit5", "adams")

GROUPS = ("ops", "forward", "unets", "train_step", "sampling", "solvers", "data", "startup")


def at_equal_evaluations(record: dict, name: str) -> float:
    """What a contender's time is multiplied by: diffusers' Heun makes one evaluation less than the others."""
    contenders = record["contenders"]
    return contenders[FAST].get("nfe", 1) / contenders[name].get("nfe", 1)
