"""Images and latents to train on: the embedded set, folders, and caches of encoded images."""

from lfm_fast.data.source import ImageSource, Report

__all__ = ["ImageSource", "Report"]
