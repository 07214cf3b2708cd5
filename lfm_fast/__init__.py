"""lfm_fast: fast latent flow matching.

Every public name is loaded on first use, so that `import lfm_fast` costs little more than `import torch`.
"""

from importlib import import_module

__version__ = "0.1.0"

# public name -> module that defines it
_EXPORTS = {
    "create_model": "lfm_fast.models",
    "load_checkpoint": "lfm_fast.checkpoint",
    "optimize": "lfm_fast.models.optimize",
    "noise": "lfm_fast.flow.noise",
    "flow_matching_loss": "lfm_fast.flow.objective",
    "sample": "lfm_fast.sampling",
    "SampleStats": "lfm_fast.sampling",
    "Sampler": "lfm_fast.sampler",
    "tune_grid": "lfm_fast.tuning",
    "LatentFlow": "lfm_fast.pipeline",
    # the classes that saved folders name
    **dict.fromkeys(("ADM", "Conditioned", "DiT", "LayoutUNet", "SongUNet", "UNet"), "lfm_fast.models"),
    "SmallVAE": "lfm_fast.autoencoder",
}
_MODULES = {
    "approximations": "lfm_fast.approximations",
    "autoencoder": "lfm_fast.autoencoder",
    "guidance": "lfm_fast.guidance",
    "interop": "lfm_fast.interop",
    "models": "lfm_fast.models",
    "ops": "lfm_fast.ops",
    "paths": "lfm_fast.flow.paths",
    "solvers": "lfm_fast.solvers",
}

__all__ = ["__version__", *_EXPORTS, *_MODULES]


def __getattr__(name):
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'lfm_fast' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
