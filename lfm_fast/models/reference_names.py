"""The reference implementation's argument names, in ours."""

_DIT = ("patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_classes", "label_dropout")
_EDM = ("in_channels", "out_channels", "model_channels", "channel_mult", "num_blocks", "attn_resolutions", "dropout")
_EDM = {"img_resolution": "image_size", "label_dim": "num_classes", **{n: n for n in (*_EDM, "label_dropout")}}
_SONG = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")
_UNET = ("image_size", "in_channels", "model_channels", "out_channels", "num_res_blocks", "channel_mult")
_UNET += ("attention_resolutions", "num_heads", "num_head_channels", "dropout", "conv_resample", "num_classes")
_UNET += ("use_scale_shift_norm", "resblock_updown")

# family -> {the reference's name: ours}
NAMES = {
    "dit": {"img_resolution": "image_size"} | {name: name for name in _DIT},
    "adm": _EDM,
    "song": {**_EDM, **{name: name for name in _SONG}},
    "guided_diffusion": {n: n for n in (*_UNET, "num_heads_upsample", "use_new_attention_order")},
    "guided_diffusion_layout": {n: n for n in (*_UNET, "transformer_depth", "context_dim")},
}

# Arguments that ours does not have, and their values under which it computes the same: both, where they change nothing
# of the result (what is kept in memory; the order of channels that a spatial transformer has not).
_EITHER = (False, True)
_UNET_VALUES = {"dims": (2,), "use_fp16": (False,), "use_checkpoint": _EITHER}
VALUES = {
    "guided_diffusion": _UNET_VALUES,
    "guided_diffusion_layout": {
        **_UNET_VALUES,
        "use_spatial_transformer": (True,),
        "num_heads_upsample": (-1,),
        "legacy": _EITHER,
        "use_new_attention_order": _EITHER,
    },
}


def in_our_names(family: str, config: dict) -> dict:
    """The reference's arguments in our names. Raises ValueError for one that ours has not, and would have to have."""
    config = dict(config)
    for name, values in VALUES.get(family, {}).items():
        value = config.pop(name, values[0])
        if value not in values:
            raise ValueError(
                f"the reference's {family!r} network has {name}={value!r}, but ours is the one of {values[0]!r} alone."
            )
    unknown = sorted(set(config) - set(NAMES.get(family, {})))
    if unknown:
        raise ValueError(f"the reference's {family!r} network has no argument {', '.join(unknown)}.")
    arguments = {NAMES[family][name]: value for name, value in config.items()}
    num_classes = arguments.get("num_classes", 0)
    if num_classes is None or (family == "dit" and num_classes in (0, 1) and not arguments.get("label_dropout", 0.0)):
        arguments["num_classes"] = 0
    return arguments
