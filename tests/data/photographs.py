"""Encoded pictures for the tests of decoders, and what Pillow makes of them."""

import io

import numpy as np
import torch
from PIL import Image

from lfm_fast.data.reading import centre_crop, decode


def photograph(width, height, seed=0):
    """A picture with a photograph's spectrum: amplitudes that fall as 1 / frequency, colours correlated."""
    generator = np.random.default_rng(seed)
    frequencies = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequencies[0, 0] = np.inf
    planes = np.fft.irfft2(np.fft.rfft2(generator.standard_normal((3, height, width))) / frequencies, (height, width))
    planes /= planes.std(axis=(1, 2), keepdims=True) + 1e-9
    mixed = np.einsum("ij,jhw->hwi", [[0.9, 0.3, 0.1], [0.9, 0, -0.2], [0.9, -0.3, 0.1]], planes)
    return Image.fromarray((128 + 48 * mixed).clip(0, 255).astype(np.uint8))


def encoded(picture, kind="jpeg", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def by_pillow(content, image_size):
    return torch.from_numpy(centre_crop(decode(content), image_size)).permute(2, 0, 1)
