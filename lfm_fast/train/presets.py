"""The runs that have a name, as a table.

The rows of the latent flow matching paper (arXiv 2307.08698): AdamW without weight decay, posterior samples of
sd-vae-ft-mse, t uniform, the straight path with sigma_min = 1e-5, EMA 0.9999; batch sizes are GPUs x images per GPU.
Its ADM is `adm-original` for CelebA-HQ 256 and 512, LSUN church and both tasks, `adm` for the others.
"""

_PUBLISHED = {
    "image_size": 256,
    "autoencoder": "stabilityai/sd-vae-ft-mse",
    "final_learning_rate": 1e-5,
    "weight_decay": 0.0,
    "ema_decay": 0.9999,
    "path": "linear",
    "sigma_min": 1e-5,
    "time_sampler": "uniform",
    "flip": True,
}
_UNCONDITIONAL = {**_PUBLISHED, "model": "DiT-L/2", "task": "unconditional", "num_classes": 0, "label_dropout": 0.0}
_FIRST = {"max_items": 120_000}  # of LSUN
_LSUN = {**_UNCONDITIONAL, **_FIRST, "learning_rate": 1e-4, "schedule": "constant", "epochs": 600.0}
_ADM_FFHQ = {**_UNCONDITIONAL, "model": "adm", "batch_size": 128, "learning_rate": 2e-5}
_ADM_FFHQ |= {"schedule": "cosine", "epochs": 500.0}
_ADM_BEDROOM = {**_ADM_FFHQ, **_FIRST, "learning_rate": 1e-5, "schedule": "constant"}
_ADM_LARGE = {**_UNCONDITIONAL, "batch_size": 8 * 6, "precision": "bf16", "learning_rate": 2e-5}
_ADM_LARGE |= {"schedule": "constant", "epochs": 1000.0}
_ADM_TASK = {**_PUBLISHED, "model": "adm-original", "num_classes": 0, "label_dropout": 0.0, "batch_size": 2 * 64}
_ADM_TASK |= {"learning_rate": 5e-5, "schedule": "cosine"}

# OpenMoji at 64 pixels, made for two CPU cores: minutes, not days
_EMBEDDED = {
    "data": "embedded",
    "model": "DiT-Emoji/4",
    "image_size": 64,
    "autoencoder": "embedded",
    "batch_size": 128,
    "steps": 1000,
    "learning_rate": 1e-3,
    "final_learning_rate": 1e-5,
    "schedule": "cosine",
    "warmup_steps": 50,
    "weight_decay": 0.0,
    "beta2": 0.99,
    "clip_grad_norm": 1.0,
    "ema_decay": 0.9999,
    "label_dropout": 0.1,
    "path": "linear",
    "sigma_min": 1e-5,
    "log_every": 10,
    "sample_every": 500,
    "checkpoint_every": 500,
    "guidance_scale": 2.0,
}

_EMOJI_TASK = {**_EMBEDDED, "label_dropout": 0.0, "guidance_scale": 1.0, "samples_per_class": 4}
_EMOJI_FROM_FLOW = {**_EMOJI_TASK, "model": "DiT-Emoji/2", "start_from": "embedded", "batch_size": 64, "steps": 1500}

PRESETS = {
    "embedded": _EMBEDDED,
    # the same with holes to paint; it begins as the flow that ships
    "emoji-inpainting": {**_EMOJI_FROM_FLOW, "task": "inpainting"},
    # the same with a label map of each picture, of its colours
    "emoji-semantic": {**_EMOJI_FROM_FLOW, "task": "semantic", "palette": "embedded"},
    # scenes of several of them, each in the box it was asked for
    "emoji-layout": {**_EMOJI_TASK, "task": "layout", "model": "ADM-Emoji-layout", "batch_size": 32, "steps": 2000},
    # 1 x 32 images, FID 5.26
    "celeba256-dit-l2": {
        **_UNCONDITIONAL,
        "batch_size": 1 * 32,
        "learning_rate": 2e-4,
        "schedule": "constant",
        "epochs": 500.0,
    },
    # 1 x 32, FID 4.55
    "ffhq256-dit-l2": {
        **_UNCONDITIONAL,
        "batch_size": 1 * 32,
        "learning_rate": 2e-4,
        "schedule": "cosine",
        "epochs": 500.0,
    },
    # 1 x 32, FID 4.92
    "bedroom256-dit-l2": {**_LSUN, "batch_size": 1 * 32},
    # 2 x 48, FID 5.54
    "church256-dit-l2": {**_LSUN, "batch_size": 2 * 48},
    # 8 x 160, FID 4.46 at guidance scale 1.5
    "imagenet256-dit-b2": {
        **_PUBLISHED,
        "model": "DiT-B/2",
        "task": "labelled",
        "num_classes": 1000,
        "label_dropout": 0.1,
        "batch_size": 8 * 160,
        "learning_rate": 1e-4,
        "schedule": "constant",
        "epochs": 1000.0,
        "guidance_scale": 1.5,
    },
    # 1 x 112, FID 5.67
    "celeba256-adm": {**_ADM_FFHQ, "model": "adm-original-celeba256", "batch_size": 1 * 112},
    # 1 x 128, FID 6.12
    "ffhq256-adm": _ADM_FFHQ,
    # 1 x 128, FID 7.05
    "bedroom256-adm": _ADM_BEDROOM,
    # FID 7.7; how it was trained is not published, so these are the bedroom's settings
    "church256-adm": {**_ADM_BEDROOM, "model": "adm-original"},
    # 8 x 96, FID 8.58 at guidance scale 1.25
    "imagenet256-adm": {
        **_PUBLISHED,
        "model": "adm",
        "task": "labelled",
        "num_classes": 1000,
        "label_dropout": 0.1,
        "batch_size": 8 * 96,
        "learning_rate": 1e-4,
        "schedule": "constant",
        "epochs": 1200.0,
        "guidance_scale": 1.25,
    },
    # 8 x 6, FID 6.35
    "celeba512-adm": {**_ADM_LARGE, "model": "adm-original-celeba512", "image_size": 512},
    # 8 x 6; neither its FID nor its network's sizes are published, which are those of the 256-pixel ones here
    "celeba1024-adm": {**_ADM_LARGE, "model": "adm", "image_size": 1024},
    # 2 x 64, each; of semantic synthesis with --conditions for the label maps
    "celeba256-inpainting": {**_ADM_TASK, "task": "inpainting", "epochs": 500.0},
    "celeba256-semantic": {**_ADM_TASK, "task": "semantic", "palette": "celebamask-hq", "epochs": 175.0},
}
