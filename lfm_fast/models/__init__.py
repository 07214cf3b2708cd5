"""The networks, all called `model(t, z, y=None)` and returning the velocity."""

from lfm_fast.models.adm import ADM
from lfm_fast.models.dit import DiT
from lfm_fast.models.registry import (
    FAMILIES,
    NETWORKS,
    create_model,
    from_config,
    from_reference_config,
    num_parameters,
)
from lfm_fast.models.song import SongUNet

__all__ = [
    "ADM",
    "FAMILIES",
    "NETWORKS",
    "DiT",
    "SongUNet",
    "create_model",
    "from_config",
    "from_reference_config",
    "num_parameters",
]
