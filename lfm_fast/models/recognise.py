"""Which of our networks a state dict without a configuration belongs to, by its keys and shapes."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lfm_fast.models.dit import DiT
from lfm_fast.models.recognise_unet import released_unet, what_is_untold
from lfm_fast.models.registry import NETWORKS, from_config
from lfm_fast.models.shapes import Shapes, capped, differences, how_many_differ, shapes_of

# how far two implementations of one network may be apart, each rounding in its own order
_SAME = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# rows of the label table -> (num_classes, label_dropout) of the released networks: unlabelled, and ImageNet
_KNOWN_LABELS = {1: (0, 0.0), 1001: (1000, 0.1)}


# what networks descended from DiT have and ours has not -> the keys that show it
_FOREIGN = {
    "a SwiGLU (an MLP with a gate)": r"blocks\.\d+\.mlp\.w\d+\.weight",
    "norms with weights (RMSNorm)": r"blocks\.\d+\.norm[12]\.weight",
    "rotary positions (RoPE)": r".*\brope|.*_rope\b",
    "norms of queries and keys with a bias": r"blocks\.\d+\.attn\.[qk]_norm\.bias",
}


def foreign_parts(shapes: Shapes) -> str:
    """What these weights of a DiT have that ours does not, in a sentence; "" where they have nothing such, or are none.

    LightningDiT (arXiv 2501.01423, section 4.2) is the best known of those.
    """
    if not {"x_embedder.proj.weight", "t_embedder.mlp.0.weight"} <= shapes.keys():
        return ""
    found = [part for part, keys in _FOREIGN.items() if any(re.match(keys, name) for name in shapes)]
    if not found:
        return ""
    return (
        f"these weights are of a DiT with {', '.join(found)}, as LightningDiT has, which our DiT has not; load them in "
        "the class they were trained in and wrap that in an adapter of lfm_fast.interop"
    )


def recognise(shapes: Shapes, hints: dict | None = None) -> nn.Module:
    """The known network, on the meta device, whose state dict has exactly these keys and shapes.

    `hints` may hold `num_classes` and `label_dropout` as the file tells them; they decide between N classes
    with a null label and N + 1 classes without, which have the same shapes.
    Raises ValueError with the nearest network and how it differs.
    """
    if untold := foreign_parts(shapes):
        raise ValueError(f"{untold}.")
    if unet := released_unet(shapes):
        return unet
    if untold := what_is_untold(shapes):
        raise ValueError(f"{untold}.")
    dit = read_dit_shapes(shapes)
    if dit is not None and dit.learned_sigma:
        raise ValueError(
            "these weights are of a DiT with learned sigmas, so of DiT or SiT, whose time or prediction is not ours: "
            "convert them, as `lfm-fast convert --from dit` or `--from sit` does."
        )
    candidates = []  # (how many keys differ, name, how, configuration)
    for name, config in _dit_candidates(shapes):
        with torch.device("meta"):
            model = from_config(config)
        expected = shapes_of(model.state_dict())
        difference = differences(expected, shapes)
        if not difference:
            return _with_labels(config, shapes, hints or {})
        candidates.append((how_many_differ(expected, shapes), name, difference))
    if not candidates:
        raise ValueError(
            f"these weights belong to no network known here (their keys begin with {capped(list(shapes), 3)}); "
            "give the network they belong to as `model`."
        )
    _, name, difference = min(candidates)
    raise ValueError(
        f"these weights belong to no network known here; the nearest is {name} with {difference}; "
        "give the network they belong to as `model`."
    )


@dataclass(frozen=True)
class DiTShapes:
    """What keys and shapes of a DiT's weights tell: its configuration but for heads, its label rows, its outputs."""

    config: dict  # but num_heads, num_classes and label_dropout
    rows: int  # of the label table
    learned_sigma: bool  # twice as many channels out as in


def read_dit_shapes(shapes: Shapes) -> DiTShapes | None:
    """The sizes of the DiT that has these weights, or None where they are no DiT's."""
    try:
        _, tokens, hidden_size = shapes["pos_embed"]
        _, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        rows, _ = shapes["y_embedder.embedding_table.weight"]
        features, _ = shapes["final_layer.linear.weight"]
        mlp_size, _ = shapes["blocks.0.mlp.fc1.weight"]
    except (KeyError, ValueError):
        return None
    config = {"family": DiT.family, "image_size": round(tokens**0.5) * patch_size, "patch_size": patch_size}
    config |= {"in_channels": in_channels, "hidden_size": hidden_size, "mlp_ratio": mlp_size / hidden_size}
    config["depth"] = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    config |= {"qk_norm": True} if "blocks.0.attn.q_norm.weight" in shapes else {}
    out_channels = features // patch_size**2
    config |= {"out_channels": out_channels} if out_channels < in_channels else {}  # the others are a condition
    return DiTShapes(config, rows, out_channels == 2 * in_channels)


def dit_from_weights(state_dict: dict, num_heads: int | None = None, num_classes: int | None = None) -> DiT:
    """Our DiT with a copy of the weights of a DiT of any project, in their dtype and place; learned sigmas are dropped.

    num_heads: not among the weights; None takes that of the published network of this width and depth. num_classes:
    the label table's rows less one, the last one meaning "no label", unless told otherwise.
    Raises ValueError, with how they differ, for weights that are not exactly a DiT's.
    """
    found, foreign = read_dit_shapes(shapes_of(state_dict)), foreign_parts(shapes_of(state_dict))
    if foreign:
        raise ValueError(f"{foreign}.")
    if found is None:
        raise ValueError(f"these weights are no DiT's (their keys begin with {capped(list(state_dict), 3)}).")
    config, size = dict(found.config), (found.config["hidden_size"], found.config["depth"])
    if num_heads is None:
        num_heads = {(a["hidden_size"], a["depth"]): a["num_heads"] for _, a in NETWORKS.values() if "depth" in a}.get(
            size
        )
    if num_heads is None:
        raise ValueError(
            f"a DiT of width {size[0]} and depth {size[1]} is none of the published ones, and the number of heads is "
            "not among the weights; give num_heads."
        )
    rows = found.rows
    num_classes = rows - 1 if num_classes is None else num_classes
    if num_classes not in (rows - 1, rows):
        raise ValueError(
            f"num_classes is {num_classes}, but the label table has {rows} rows; give {rows - 1} or {rows}."
        )
    label_dropout = 0.1 if 0 < num_classes == rows - 1 else 0.0
    config |= {"num_heads": num_heads, "num_classes": num_classes, "label_dropout": label_dropout}
    weights = _without_sigmas(state_dict, config) if found.learned_sigma else state_dict
    with torch.device("meta"):
        model = from_config(config)
    difference = differences(shapes_of(model.state_dict()), shapes_of(weights))
    if difference:
        raise ValueError(f"these weights are not exactly a DiT's; {difference}.")
    model.load_state_dict({name: tensor.detach().clone() for name, tensor in weights.items()}, assign=True)
    model.pos_embed.requires_grad_(False)
    return model


def same_as(network: nn.Module) -> DiT:
    """Our DiT with a copy of the weights of a network of another class that is called as ours is, model(t, z, y).

    Raises ValueError unless the weights are exactly a DiT's and both compute the same with them.
    """
    heads = getattr(network, "num_heads", None)
    ours = dit_from_weights(network.state_dict(), heads if isinstance(heads, int) else None)

    def theirs(t, z, y):
        try:
            velocity = network(t, z, y)
        except Exception as error:
            raise ValueError(f"{_WRAP.format(type(network).__name__)} ({error}).") from error
        if not isinstance(velocity, torch.Tensor) or velocity.shape != z.shape:
            raise ValueError(f"{_WRAP.format(type(network).__name__)}.")
        return velocity

    require_same(ours, network, theirs, ours)
    return ours


_WRAP = "this {} is not called as model(t, z, y), giving a velocity; wrap it in an adapter of lfm_fast.interop"


@torch.no_grad()
def require_same(ours: DiT, network: nn.Module, theirs: Callable, converted: Callable) -> None:
    """Raise ValueError unless `theirs` and `converted`, functions of (t, z, y), give the same for two samples."""
    place = {"device": ours.pos_embed.device, "dtype": ours.x_embedder.proj.weight.dtype}
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, ours.in_channels, ours.image_size, ours.image_size, generator=generator).to(**place)
    t, y = torch.tensor([0.25, 7.0]).to(z), torch.tensor([0, ours.num_labels - 1], device=z.device)
    training = network.training
    ours.eval()
    network.eval()  # in training, networks drop labels
    try:
        want, got = theirs(t, z, y).double(), converted(t, z, y).double()
    finally:
        network.train(training)
    if not want.any():
        raise ValueError("this network returns nothing but zeros, which any network may: give it its weights first.")
    error = float((got - want).norm() / want.norm())
    if not error < _SAME[place["dtype"]]:
        raise ValueError(
            f"this {type(network).__name__} has the weights of a DiT but computes something else with them (another "
            f"result by {error:.1e}), so that ours cannot stand for it."
        )


def _without_sigmas(state_dict: dict, config: dict) -> dict:
    """The read-out's rows stand in order (row, column, channel): the first half of each entry's channels is kept."""
    channels = config["in_channels"]
    names = ("final_layer.linear.weight", "final_layer.linear.bias")
    halves = {name: state_dict[name].unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1) for name in names}
    return {**state_dict, **halves}


def _dit_candidates(shapes: Shapes):
    """(name, configuration) of every named DiT, with what a checkpoint may vary taken from the shapes."""
    try:
        _, tokens, hidden_size = shapes["pos_embed"]
        _, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
        rows, _ = shapes["y_embedder.embedding_table.weight"]
        features, _ = shapes["final_layer.linear.weight"]
    except (KeyError, ValueError):
        return
    named = [(name, arguments) for name, (network, arguments) in NETWORKS.items() if network is DiT]
    same_size = [(n, a) for n, a in named if (a["hidden_size"], a["patch_size"]) == (hidden_size, patch_size)]
    for name, arguments in same_size or named:
        side = round(tokens**0.5) * arguments["patch_size"]
        table = {"num_classes": rows - 1, "label_dropout": 0.1} if rows > 1 else {}
        norm = {"qk_norm": True} if "blocks.0.attn.q_norm.weight" in shapes else {}
        out_channels = min(max(features // arguments["patch_size"] ** 2, 1), in_channels)
        channels = {"in_channels": in_channels, "out_channels": out_channels}
        yield name, {"family": DiT.family, **arguments, "image_size": side, **channels, **table, **norm}


def _with_labels(config: dict, shapes: Shapes, hints: dict) -> nn.Module:
    """Rebuild the matching network with the meaning of its label table's rows settled."""
    rows, _ = shapes["y_embedder.embedding_table.weight"]
    num_classes, label_dropout = hints.get("num_classes"), hints.get("label_dropout")
    told = isinstance(num_classes, int) and isinstance(label_dropout, float | int)
    if not (told and rows > 1 and num_classes + (label_dropout > 0) == rows):
        if rows not in _KNOWN_LABELS:
            raise ValueError(
                f"the label table of these weights has {rows} rows, maybe {rows - 1} classes and a null label or "
                f"{rows} classes without; build the network with create_model and give it as `model`, or convert "
                "the file by `lfm-fast convert --network`."
            )
        num_classes, label_dropout = _KNOWN_LABELS[rows]
    with torch.device("meta"):
        return from_config({**config, "num_classes": num_classes, "label_dropout": float(label_dropout)})
