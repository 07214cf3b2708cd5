"""Noise becomes an image: `LatentFlow`."""

from lfm_fast.autoencoder import EMBEDDED_FOLDER
from lfm_fast.pipeline.folders import INDEX
from lfm_fast.pipeline.latent_flow import LatentFlow

__all__ = ["EMBEDDED_FOLDER", "INDEX", "LatentFlow"]
