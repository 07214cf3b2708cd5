"""The runs that have a name, as a table.

The DiT rows of the latent flow matching paper (arXiv 2307.08698): AdamW without weight decay, posterior samples of
sd-vae-ft-mse, t uniform, the straight path with sigma_min = 1e-5, EMA 0.9999; batch sizes are GPUs x images per GPU.
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
_LSUN = {**_UNCONDITIONAL, "max_items": 120_000, "learning_rate": 1e-4, "schedule": "constant", "epochs": 600.0}

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

PRESETS = {
    "embedded": _EMBEDDED,
    # the same with holes to paint
    "emoji-inpainting": {
        **_EMBEDDED,
        "task": "inpainting",
        "model": "ADM-Emoji",
        "batch_size": 64,
        "steps": 1500,
        "label_dropout": 0.0,
        "guidance_scale": 1.0,
        "samples_per_class": 4,
    },
    # the same with a label map of each picture, of its colours
    "emoji-semantic": {
        **_EMBEDDED,
        "task": "semantic",
        "palette": "embedded",
        "model": "DiT-Emoji/2",
        "batch_size": 64,
        "steps": 1500,
        "label_dropout": 0.0,
        "guidance_scale": 1.0,
        "samples_per_class": 4,
    },
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
}
