"""Images to latents and back: the posterior, the one wrapper around every VAE, and the small embedded VAE.

A latent here is always in *latent units*: the VAE's own latent times its ``scaling_factor``, which brings it near unit
variance, as the flow needs. Images are float in [-1, 1].
"""

import contextlib
import hashlib
import json
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from importlib import resources
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lfm_fast import ops
from lfm_fast.ops.streams import STREAM_POSTERIOR

EMBEDDED_FOLDER = resources.files("lfm_fast") / "embedded"  # the flow and, in vae/, the VAE that ship with the package
DEFAULT_HUB_NAME = "stabilityai/sd-vae-ft-mse"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"  # diffusers' name, so that one folder format serves both


@dataclass(frozen=True)
class Posterior:
    """The diagonal Gaussian q(z_0 | image) = N(mean, exp(log_variance)), in latent units.

    Shapes: ``mean`` and ``log_variance`` are (B, C, h, w). Source: Kingma & Welling, arXiv 1312.6114.
    """

    mean: torch.Tensor
    log_variance: torch.Tensor

    def mode(self):
        """The most likely latent, (B, C, h, w)."""
        return self.mean

    def sample(self, index, seed=0):
        """z_0 = mean + exp(log_variance / 2) n, where n depends on (seed, index of the sample) alone.

        ``index`` (B,) int64 is each image's global sample number; returns (B, C, h, w).
        """
        shape = self.mean.shape
        if index.shape != shape[:1]:
            raise ValueError(f"index has shape {tuple(index.shape)}; a batch of {shape[0]} images needs ({shape[0]},)")
        normal = ops.philox_normal(index, shape[1:].numel(), seed, STREAM_POSTERIOR).view(shape)
        return self.mean + torch.exp(0.5 * self.log_variance) * normal.to(self.mean.dtype)


class Autoencoder(nn.Module):
    """A VAE behind one interface: images in [-1, 1] to a scaled ``Posterior`` and latents back to images.

    ``network`` is a diffusers ``AutoencoderKL`` or a ``SmallVAE``; both have ``encode(x).latent_dist`` and
    ``decode(z).sample`` and a ``scaling_factor`` in their configuration.
    """

    def __init__(self, network, name):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name = name
        config = network.config
        self.scaling_factor = float(config["scaling_factor"])
        self.latent_channels = int(config["latent_channels"])
        self.downsampling = 2 ** (len(config["block_out_channels"]) - 1)

    @property
    def dtype(self):
        return next(self.network.parameters()).dtype

    @property
    def fingerprint(self):
        """Twelve hex digits of a hash over all weights: which VAE made these latents."""
        digest = hashlib.sha256()
        for key, value in self.network.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:12]

    @torch.no_grad()
    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> ``Posterior`` with (B, C, H / downsampling, W / downsampling) in latent units."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; the autoencoder takes (B, 3, H, W)")
        if images.shape[2] % self.downsampling or images.shape[3] % self.downsampling:
            raise ValueError(
                f"images are {images.shape[2]}x{images.shape[3]}; both sides must be multiples of {self.downsampling}"
            )
        distribution = self.network.encode(images.to(self.dtype)).latent_dist
        log_scale = 2 * torch.log(torch.tensor(self.scaling_factor))
        return Posterior(distribution.mean.float() * self.scaling_factor, distribution.logvar.float() + log_scale)

    @torch.no_grad()
    def decode(self, latents):
        """(B, C, h, w) in latent units -> images (B, 3, H, W), float32, clamped to [-1, 1]."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; {self.name} decodes (B, {self.latent_channels}, h, w)"
            )
        images = self.network.decode((latents / self.scaling_factor).to(self.dtype)).sample
        return images.float().clamp(-1, 1)

    def save_pretrained(self, folder):
        """Write config.json and the weights into ``folder`` in diffusers' layout. Raises OSError if it cannot."""
        from safetensors import SafetensorError

        try:
            self.network.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(f"cannot write {folder}: {error}") from error


class ResidualBlock(nn.Module):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))), width unchanged."""

    def __init__(self, channels):
        super().__init__()
        self.norm1 = nn.GroupNorm(channels // 16, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(channels // 16, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h)))


@dataclass
class _Gaussian:
    mean: torch.Tensor
    logvar: torch.Tensor


@dataclass
class _Encoded:
    latent_dist: _Gaussian


@dataclass
class _Decoded:
    sample: torch.Tensor


class SmallVAE(nn.Module):
    """The embedded VAE: a small convolutional autoencoder with diffusers' calling convention and folder format.

    ``block_out_channels`` are the widths from full resolution down; each further level halves the side.
    """

    def __init__(self, *, block_out_channels=(32, 64, 128), layers_per_block=1, latent_channels=4, scaling_factor=1.0):
        super().__init__()
        self.config = {
            "_class_name": "SmallVAE",
            "block_out_channels": list(block_out_channels),
            "layers_per_block": layers_per_block,
            "latent_channels": latent_channels,
            "scaling_factor": scaling_factor,
        }
        widths = list(block_out_channels)
        self.encoder = nn.Sequential(*_encoder_layers(widths, layers_per_block, latent_channels))
        self.decoder = nn.Sequential(*_decoder_layers(widths, layers_per_block, latent_channels))
        self.to(memory_format=torch.channels_last)  # convolutions run twice as fast on CPUs

    def encode(self, x):
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return _Encoded(_Gaussian(mean, log_variance.clamp(-20, 10)))

    def decode(self, z):
        return _Decoded(self.decoder(z))

    def save_pretrained(self, folder):
        """Write config.json and float16 weights: half the size, and far below the reconstruction error."""
        from safetensors.torch import save_file

        folder = Path(folder)
        half = {key: value.detach().to(torch.float16).contiguous() for key, value in self.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{WEIGHTS_FILE}.partial"
        save_file(half, partial)
        partial.replace(folder / WEIGHTS_FILE)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")  # last: then it is whole

    @classmethod
    def from_pretrained(cls, folder):
        """Read what ``save_pretrained`` wrote; weights become float32. Raises ValueError for a damaged folder."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if not k.startswith("_")}
        network = cls(**config)
        try:
            weights = load((folder / WEIGHTS_FILE).read_bytes())
        except OSError as error:
            raise ValueError(f"{folder} holds a config.json but no {WEIGHTS_FILE}") from error
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} is truncated or no safetensors file ({error})") from error
        try:
            network.load_state_dict({key: value.float() for key, value in weights.items()})
        except RuntimeError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} does not fit the config.json beside it") from error
        return network


def _encoder_layers(widths, layers_per_block, latent_channels):
    yield nn.Conv2d(3, widths[0], 3, padding=1)
    for narrow, wide in pairwise(widths):
        yield nn.Conv2d(narrow, wide, 4, stride=2, padding=1)
        yield from (ResidualBlock(wide) for _ in range(layers_per_block))
    yield ResidualBlock(widths[-1])
    yield nn.GroupNorm(widths[-1] // 16, widths[-1])
    yield nn.SiLU()
    yield nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)


def _decoder_layers(widths, layers_per_block, latent_channels):
    yield nn.Conv2d(latent_channels, widths[-1], 3, padding=1)
    yield ResidualBlock(widths[-1])
    for wide, narrow in pairwise(reversed(widths)):
        yield from (ResidualBlock(wide) for _ in range(layers_per_block))
        yield nn.Upsample(scale_factor=2, mode="nearest")
        yield nn.Conv2d(wide, narrow, 3, padding=1)
    yield ResidualBlock(widths[0])
    yield nn.GroupNorm(widths[0] // 16, widths[0])
    yield nn.SiLU()
    yield nn.Conv2d(widths[0], 3, 3, padding=1)


def load_autoencoder(name_or_folder="embedded", device=None):
    """An ``Autoencoder`` from the package ("embedded"), a local folder, or a name on the Hugging Face hub.

    A folder holds config.json and diffusion_pytorch_model.safetensors (diffusers' layout), or has them in a sub-folder
    ``vae``. Raises ValueError with one sentence where nothing usable is found.
    """
    device = device or "cpu"
    if str(name_or_folder) == "embedded":
        return Autoencoder(SmallVAE.from_pretrained(EMBEDDED_FOLDER / "vae"), "embedded").to(device)
    folder = Path(name_or_folder)
    if folder.is_dir():
        return Autoencoder(_from_folder(folder), str(name_or_folder)).to(device)
    if folder.is_absolute() or str(name_or_folder).startswith(".") or str(name_or_folder).count("/") != 1:
        raise ValueError(f"autoencoder folder {str(name_or_folder)!r} does not exist")
    return Autoencoder(_from_hub(str(name_or_folder)), str(name_or_folder)).to(device)


def _from_folder(folder):
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds no config.json; expected a VAE in diffusers' layout (config.json, {WEIGHTS_FILE})"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is no JSON ({error})") from error
    if isinstance(config, dict) and config.get("_class_name") == "SmallVAE":
        return SmallVAE.from_pretrained(folder)
    try:
        return _load_diffusers(str(folder), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{folder} does not load as a diffusers AutoencoderKL: {reason}") from error


def _from_hub(name):
    from huggingface_hub import constants

    with contextlib.suppress(OSError, ValueError):
        return _load_diffusers(name, local_files_only=True)  # downloaded before
    try:
        if not constants.HF_HUB_OFFLINE:
            _require_answer(constants.ENDPOINT)
        return _load_diffusers(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"autoencoder {name!r} is neither a local folder nor reachable on the hub; download its config.json and "
            f"{WEIGHTS_FILE} on a connected machine, put both into one folder and pass that folder's path"
        ) from error


def _require_answer(address, seconds=10):
    """Raises OSError where nobody answers there: the hub's own client would try for half a minute, and print it all."""
    with contextlib.suppress(urllib.error.HTTPError):  # any answer is one
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=seconds).close()


def _load_diffusers(name, **options):
    """An AutoencoderKL with all its weights; diffusers alone would fill missing ones with fresh random numbers."""
    from diffusers import AutoencoderKL

    options |= {"output_loading_info": True, "low_cpu_mem_usage": False}  # True wants accelerate, and says so
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # diffusers' own
        network, info = AutoencoderKL.from_pretrained(name, **options)
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    if wrong:
        raise ValueError(f"{len(wrong)} of its weights are missing or do not fit, the first being {wrong[0]}")
    return network
