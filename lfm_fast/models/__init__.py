"""The networks, all called `model(t, z, y=None)` and returning the velocity."""

from lfm_fast.models.adm import ADM
from lfm_fast.models.conditioned import Conditioned
from lfm_fast.models.dit import DiT
from lfm_fast.models.layout_unet import LayoutUNet
from lfm_fast.models.registry import (
    FAMILIES,
    NETWORKS,
    create_model,
    from_config,
    from_reference_config,
    num_parameters,
)
from lfm_fast.models.song import SongUNet
from lfm_fast.models.unet import UNet

__all__ = [
    "ADM",
    "FAMILIES",
    "NETWORKS",
    "Conditioned",
    "DiT",
    "LayoutUNet",
    "SongUNet",
    "UNet",
    "create_model",
    "from_config",
    "from_reference_config",
    "num_parameters",
]
