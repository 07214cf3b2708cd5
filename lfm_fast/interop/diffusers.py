"""diffusers' DiTTransformer2DModel and our DiT: the same weights, either way.

What differs, beside names: diffusers keeps the embedders of time and label in every block (ours are shared), splits qkv
in three, recomputes the position table instead of storing it, and calls its network with keywords. Two things its
configuration does not hold have to be set by hand after every load, which `align` does:

- its time frequencies are 10000^(-i / (half - 1)) where DiT's are 10000^(-i / half) (`downscale_freq_shift`): a network
  converted without this differs by about 2.5e-3;
- in training mode it drops a tenth of the labels itself (`dropout_prob`), where ours leaves that to the training loop.

Times go in raw: what diffusers calls `timestep` is our t in [0, 1], so its schedulers' timesteps are divided by their
`num_train_timesteps`.
"""

import torch
from torch import Tensor, nn

from lfm_fast.models import DiT

_BLOCK = "transformer_blocks.{}."
_EMBEDDERS = {  # ours, shared by all blocks -> theirs, one in each
    "t_embedder.mlp.0.": "norm1.emb.timestep_embedder.linear_1.",
    "t_embedder.mlp.2.": "norm1.emb.timestep_embedder.linear_2.",
    "y_embedder.embedding_table.": "norm1.emb.class_embedder.embedding_table.",
}
_IN_A_BLOCK = {
    "adaLN_modulation.1.": "norm1.linear.",
    "attn.proj.": "attn1.to_out.0.",
    "mlp.fc1.": "ff.net.0.proj.",
    "mlp.fc2.": "ff.net.2.",
}
_OUTSIDE = {
    "x_embedder.proj.": "pos_embed.proj.",
    "final_layer.adaLN_modulation.1.": "proj_out_1.",
    "final_layer.linear.": "proj_out_2.",
}
_QKV = ("attn1.to_q.", "attn1.to_k.", "attn1.to_v.")
_POSITIONS = "pos_embed"  # ours stores the table, theirs recomputes it
_SETTINGS = ("family", "image_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio")
_SETTINGS += ("num_classes", "label_dropout")
_FIXED = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}


def to_diffusers(model: DiT):
    """A `DiTTransformer2DModel` with a copy of the weights of `model`, in its dtype, mode and place, already aligned.

        transformer(z, timestep=t, class_labels=y).sample = model(t, z, y)

    z (B, C, H, W), t (B,) in [0, 1], y (B,) integer labels; float64 agrees up to the time features, which diffusers
    always computes in float32. An unlabelled network takes labels of zeros. `save_pretrained` keeps weights and
    configuration; `align` what was loaded again.

    Raises ValueError for a network whose MLP is not four times as wide as its tokens, or that has layers or another
    position table than diffusers' class knows.

    >>> model = lfm_fast.DiT(image_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=3, label_dropout=0.1)
    >>> transformer = to_diffusers(model)
    >>> z, t, y = torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9]), torch.tensor([2, 3])
    >>> bool(torch.allclose(transformer(z, timestep=t, class_labels=y).sample, model(t, z, y), atol=1e-5))
    True

    Source: arXiv 2212.09748; names and shapes from diffusers' documentation and state dict.
    """
    from diffusers import DiTTransformer2DModel

    _check_ours(model)
    config, state = model.config, model.state_dict()
    transformer = DiTTransformer2DModel(
        num_attention_heads=config["num_heads"],
        attention_head_dim=config["hidden_size"] // config["num_heads"],
        in_channels=config["in_channels"],
        out_channels=config["in_channels"],
        num_layers=config["depth"],
        sample_size=config["image_size"],
        patch_size=config["patch_size"],
        num_embeds_ada_norm=model.num_labels - 1,  # its table has one row more
        norm_eps=1e-6,
    )
    _check_positions(state[_POSITIONS], transformer)
    place = {"device": state[_POSITIONS].device, "dtype": state["x_embedder.proj.weight"].dtype}
    nn.Module.to(transformer, **place)  # its own `to` warns of what does not concern this network
    transformer.load_state_dict(their_names(state, config["depth"]))
    with torch.no_grad():
        transformer.pos_embed.pos_embed.copy_(state[_POSITIONS])
    return align(transformer).train(model.training)


def from_diffusers(transformer, *, num_classes: int | None = None, label_dropout: float = 0.1) -> DiT:
    """Our DiT with a copy of the weights of a `DiTTransformer2DModel`, in its dtype, mode and place.

    Its label table has one row more than its configuration says, the last of which means "no label": `num_classes` is
    the table's rows less one unless told otherwise (all of its rows, for a network without a null label); a table of
    one row is an unlabelled network. diffusers does not store how many labels were dropped: `label_dropout` only goes
    into the configuration. The result computes with DiT's time frequencies and norms (eps 1e-6), as `align` makes the
    transformer do: a network that diffusers itself trained, on its own frequencies, differs by about 2.5e-3.

    Raises ValueError where blocks embed times or labels with weights of their own, for learned sigma channels, and for
    settings that our DiT does not have.

    >>> model = lfm_fast.DiT(image_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=3, label_dropout=0.1)
    >>> from_diffusers(to_diffusers(model)).config == model.config
    True

    Source: arXiv 2212.09748.
    """
    _check_theirs(transformer)
    config, state = transformer.config, transformer.state_dict()
    rows = len(state[_BLOCK.format(0) + _EMBEDDERS["y_embedder.embedding_table."] + "weight"])
    num_classes = rows - 1 if num_classes is None else num_classes
    if num_classes not in (rows - 1, rows):
        raise ValueError(
            f"num_classes is {num_classes}, but the label table has {rows} rows; give {rows - 1} or {rows}."
        )
    _check_shared(state, config.num_layers)
    model = DiT(
        image_size=config.sample_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        hidden_size=config.num_attention_heads * config.attention_head_dim,
        depth=config.num_layers,
        num_heads=config.num_attention_heads,
        num_classes=num_classes,
        label_dropout=label_dropout if 0 < num_classes == rows - 1 else 0.0,
    )
    positions = transformer.pos_embed.pos_embed
    model.to(device=positions.device, dtype=transformer.dtype)
    model.load_state_dict({**our_names(state, config.num_layers), _POSITIONS: positions})
    return model.train(transformer.training)


def align(transformer):
    """Make a loaded `DiTTransformer2DModel` compute what our DiT computes, in place; returns it.

    Sets the time frequencies to 10000^(-i / half), and label dropout, which is the training loop's, to 0.
    """
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm1.emb.class_embedder.dropout_prob = 0.0
    return transformer


class DiffusersVelocity(nn.Module):
    """An aligned `DiTTransformer2DModel`, called as our models are: velocity (B, C, H, W) = model(t, z, y).

    t (B,) or () in [0, 1], z (B, C, H, W) in any floating dtype, y (B,) integer labels; y=None means the table's last
    row, as with ours. `null_label` is the row that means "no label", None for an unlabelled network.
    """

    def __init__(self, transformer):
        super().__init__()
        self.transformer = transformer
        self.null_label = transformer.config.num_embeds_ada_norm or None

    def forward(self, t: Tensor, z: Tensor, y: Tensor | None = None) -> Tensor:
        if y is None:
            y = torch.full((len(z),), self.transformer.config.num_embeds_ada_norm, device=z.device)
        z, t = z.to(self.transformer.dtype), t.expand(len(z))
        return self.transformer(z, timestep=t, class_labels=y, return_dict=False)[0]


def their_names(state: dict, depth: int) -> dict:
    """Our state dict under diffusers' names, without the position table; embedders are repeated in every block."""
    found = {new + key.removeprefix(old): state[key] for old, new in _OUTSIDE.items() for key in _keys(state, old)}
    for number in range(depth):
        block = _BLOCK.format(number)
        for old, new in _EMBEDDERS.items():
            found |= {block + new + key.removeprefix(old): state[key] for key in _keys(state, old)}
        for old, new in _IN_A_BLOCK.items():
            old = f"blocks.{number}.{old}"
            found |= {block + new + key.removeprefix(old): state[key] for key in _keys(state, old)}
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{number}.attn.qkv.{kind}"].chunk(3)
            found |= {block + name + kind: part for name, part in zip(_QKV, parts)}
    return found


def our_names(state: dict, depth: int) -> dict:
    """diffusers' state dict under our names, without the position table; embedders are those of the first block."""
    found = {old + key.removeprefix(new): state[key] for old, new in _OUTSIDE.items() for key in _keys(state, new)}
    for old, new in _EMBEDDERS.items():
        new = _BLOCK.format(0) + new
        found |= {old + key.removeprefix(new): state[key] for key in _keys(state, new)}
    for number in range(depth):
        block = _BLOCK.format(number)
        for old, new in _IN_A_BLOCK.items():
            new = block + new
            found |= {f"blocks.{number}.{old}{key.removeprefix(new)}": state[key] for key in _keys(state, new)}
        for kind in ("weight", "bias"):
            found[f"blocks.{number}.attn.qkv.{kind}"] = torch.cat([state[block + name + kind] for name in _QKV])
    return found


def _keys(state: dict, prefix: str) -> list[str]:
    return [key for key in state if key.startswith(prefix)]


def _check_ours(model) -> None:
    if not isinstance(model, DiT):
        raise ValueError(f"a DiTTransformer2DModel is made from a DiT, not from a {type(model).__name__}.")
    config, width = model.config, model.config["mlp_ratio"]
    if int(config["hidden_size"] * width) != 4 * config["hidden_size"]:
        raise ValueError(
            f"diffusers' DiT has an mlp_ratio of 4, but this network's is {width}; it cannot be converted."
        )
    extra = [name for name, value in config.items() if name not in _SETTINGS and value]
    if extra:
        raise ValueError(f"diffusers' DiT has no {', '.join(extra)}, which this network was built with.")
    with torch.device("meta"):
        plain = DiT(**{name: config[name] for name in _SETTINGS if name != "family"})
    unknown = sorted(plain.state_dict().keys() ^ model.state_dict().keys())
    if unknown:
        raise ValueError(f"this network is no plain DiT: its weights differ in {', '.join(unknown[:3])}.")


def _check_positions(ours: Tensor, transformer) -> None:
    theirs = transformer.pos_embed.pos_embed.to(device=ours.device, dtype=torch.float64)
    largest = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(ours.dtype, 1e-5)  # how the weights' dtype rounds 1
    if not torch.allclose(ours.double(), theirs, rtol=0, atol=largest):
        raise ValueError("diffusers' DiT recomputes its sine-cosine position table, and this network's is another one.")


def _check_theirs(transformer) -> None:
    from diffusers import DiTTransformer2DModel

    if not isinstance(transformer, DiTTransformer2DModel):
        raise ValueError(f"expected a DiTTransformer2DModel of diffusers, but this is a {type(transformer).__name__}.")
    config = transformer.config
    for name, value in _FIXED.items():
        if config[name] != value:
            raise ValueError(f"our DiT has {name} {value!r}, but this transformer's is {config[name]!r}.")
    if transformer.out_channels != config.in_channels:
        raise ValueError(
            f"this transformer returns {transformer.out_channels} channels for {config.in_channels} (learned sigmas), "
            "but a velocity has as many as the latents."
        )


def _check_shared(state: dict, depth: int) -> None:
    for new in _EMBEDDERS.values():
        for key in _keys(state, _BLOCK.format(0) + new):
            for number in range(1, depth):
                other = key.replace(_BLOCK.format(0), _BLOCK.format(number), 1)
                if not torch.equal(state[key], state[other]):
                    raise ValueError(
                        f"block {number} of this transformer has time or label embedders of its own ({other}), "
                        "but our DiT shares one among all blocks; only transformers whose copies are equal convert."
                    )
