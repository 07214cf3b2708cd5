"""diffusers' networks as velocity fields; its DiTTransformer2DModel and our DiT, the same weights, either way.

What differs between the two DiTs, beside names: diffusers keeps the embedders of time and label in every block (ours
are shared), splits qkv in three, recomputes the position table instead of storing it, and calls its network with
keywords. Two things its configuration does not hold have to be set by hand after every load, which `align` does:

- its time frequencies are 10000^(-i / (half - 1)) where DiT's are 10000^(-i / half) (`downscale_freq_shift`): a network
  converted without this differs by about 2.5e-3;
- in training mode it drops a tenth of the labels itself (`dropout_prob`), where ours leaves that to the training loop.

Times go into a converted network raw: what diffusers calls `timestep` is our t in [0, 1]. Networks trained by diffusers
itself take those of a scheduler, which `DiffusersVelocity` makes of t.
"""

import torch
from torch import Tensor, nn

from lfm_fast.flow.paths import Linear
from lfm_fast.interop.adapter import Adapter
from lfm_fast.interop.discrete import DiscretePath
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
_SETTINGS += ("num_classes", "label_dropout", "out_channels")
_FIXED = {"activation_fn": "gelu-approximate", "attention_bias": True, "norm_elementwise_affine": False}


def to_diffusers(model: DiT):
    """A `DiTTransformer2DModel` with a copy of the weights of `model`, in its dtype, mode and place, already aligned.

        transformer(z, timestep=t, class_labels=y).sample = model(t, z, y)

    z (B, C, H, W), t (B,) in [0, 1], y (B,) integer labels; float64 agrees up to the time features, which diffusers
    always computes in float32. An unlabelled network takes labels of zeros. `save_pretrained` keeps weights and
    configuration; `align` what was loaded again. A FlowMatchEulerDiscreteScheduler(num_train_timesteps=1), its times
    given as set_timesteps(sigmas=[1.0, ...]), then samples from it in diffusers. A network with a condition takes it
    behind the latents, in one z of all its input channels.

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
        out_channels=model.out_channels,
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
        out_channels=transformer.out_channels,
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


class DiffusersVelocity(Adapter):
    """A network of diffusers as our velocity field; its scheduler says what it predicts, and at which timesteps.

        u(z, t) = network(z, N t).sample                                    a flow-matching scheduler
        u from network(z, N t - 1).sample by `path`                         a scheduler of the DDPM family
        u(z, t) = network(z, t).sample                                      no scheduler: what `to_diffusers` makes

    N is the scheduler's num_train_timesteps. In the DDPM family the network predicts noise, data or v, as its
    prediction_type says; the path is that of the scheduler's own table, step i at t = (i + 1) / N (see DiscretePath),
    and `lfm_fast.sample` takes it from here. There the second half of 2 C channels, learned sigmas, is dropped;
    elsewhere learned_sigma=True drops it. A flow scheduler's `shift` only places its steps: time_grid=("shift",
    scheduler.config.shift).

    network: a UNet2DModel, DiTTransformer2DModel or any other module called network(z, timestep=..., labels=...,
    return_dict=False), with further conditions in `model_kwargs` of `lfm_fast.sample`. labels: the keyword that y is
    given as. null_label: the row that means "no label"; known by itself for a DiTTransformer2DModel.

    Raises ValueError for what cannot be used, before the network is called.

    >>> from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DModel
    >>> blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    >>> unet = UNet2DModel(sample_size=8, in_channels=4, out_channels=4, norm_num_groups=4, **blocks).eval()
    >>> field = DiffusersVelocity(unet, FlowMatchEulerDiscreteScheduler())
    >>> lfm_fast.sample(field, torch.randn(2, 4, 8, 8), method="heun", num_steps=2).shape
    torch.Size([2, 4, 8, 8])

    Source: diffusers' documentation of these classes; Esser et al., arXiv 2403.03206 (flows); Ho et al., arXiv
    2006.11239, and Salimans & Ho, arXiv 2202.00512, appendix D (v), for the others.
    """

    def __init__(
        self,
        network,
        scheduler=None,
        *,
        labels: str = "class_labels",
        null_label: int | None = None,
        learned_sigma: bool | None = None,
    ):
        from diffusers import DiTTransformer2DModel

        is_dit = isinstance(network, DiTTransformer2DModel)
        if scheduler is None and not is_dit:
            raise ValueError(
                f"a {type(network).__name__} does not tell whether it predicts a velocity, noise or data, nor its "
                "timesteps; give the scheduler it was trained with, such as FlowMatchEulerDiscreteScheduler()."
            )
        predicts, path, scale = _of_scheduler(scheduler)
        if null_label is None and is_dit:
            null_label = network.config.num_embeds_ada_norm
        if learned_sigma is None:
            learned_sigma = isinstance(path, DiscretePath)
        super().__init__(network, predicts=predicts, path=path, null_label=null_label, learned_sigma=learned_sigma)
        self.labels, self.scale = labels, scale

    def their_time(self, t: Tensor) -> Tensor:
        return self.path.timestep(t) if isinstance(self.path, DiscretePath) else self.scale * t

    def call(self, z: Tensor, time: Tensor, y: Tensor | None, **kwargs):
        labels = {} if y is None else {self.labels: y}
        result = self.network(z, timestep=time, **labels, **kwargs)
        return result[0] if isinstance(result, tuple) else getattr(result, "sample", result)

    def weights(self) -> tuple[dict, int | None]:
        _check_settings(self.network)
        config, state = self.network.config, self.network.state_dict()
        _check_shared(state, config.num_layers)
        named = {**our_names(state, config.num_layers), _POSITIONS: self.network.pos_embed.pos_embed}
        return named, config.num_attention_heads


_PREDICTIONS = {"epsilon": "noise", "sample": "data", "v_prediction": "v"}  # prediction_type of a scheduler -> ours


def _of_scheduler(scheduler):
    """(what its networks predict, their path, what t is multiplied by)."""
    if scheduler is None:
        return "velocity", None, 1
    kind, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    predicts = config.get("prediction_type")
    if "FlowMatch" in kind or predicts == "flow_prediction":
        if config.get("invert_sigmas"):
            raise ValueError(f"this {kind} has invert_sigmas, time from noise to data; wrap the network in a function.")
        return "velocity", Linear(), config["num_train_timesteps"]
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or predicts not in _PREDICTIONS:
        raise ValueError(
            f"a {kind} with prediction_type {predicts!r} is none of those known here: a flow-matching scheduler, or "
            f"one with alphas_cumprod and a prediction_type of {', '.join(_PREDICTIONS)}."
        )
    return _PREDICTIONS[predicts], DiscretePath(table), None


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
        plain = DiT(**{name: config[name] for name in _SETTINGS if name != "family" and name in config})
    unknown = sorted(plain.state_dict().keys() ^ model.state_dict().keys())
    if unknown:
        raise ValueError(f"this network is no plain DiT: its weights differ in {', '.join(unknown[:3])}.")


def _check_positions(ours: Tensor, transformer) -> None:
    theirs = transformer.pos_embed.pos_embed.to(device=ours.device, dtype=torch.float64)
    largest = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(ours.dtype, 1e-5)  # how the weights' dtype rounds 1
    if not torch.allclose(ours.double(), theirs, rtol=0, atol=largest):
        raise ValueError("diffusers' DiT recomputes its sine-cosine position table, and this network's is another one.")


def _check_settings(transformer) -> None:
    from diffusers import DiTTransformer2DModel

    if not isinstance(transformer, DiTTransformer2DModel):
        raise ValueError(f"expected a DiTTransformer2DModel of diffusers, but this is a {type(transformer).__name__}.")
    config = transformer.config
    for name, value in _FIXED.items():
        if config[name] != value:
            raise ValueError(f"our DiT has {name} {value!r}, but this transformer's is {config[name]!r}.")


def _check_theirs(transformer) -> None:
    _check_settings(transformer)
    config = transformer.config
    if transformer.out_channels > config.in_channels:
        raise ValueError(
            f"this transformer returns {transformer.out_channels} channels for {config.in_channels} (learned sigmas), "
            "but a velocity has as many as the latents; lfm_fast.interop.files converts it with its scheduler."
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
