"""Images to latents and back: the posterior, the one wrapper around every VAE, and where VAEs are loaded from.

A latent here is always in *latent units*: the VAE's own latent less its ``shift_factor``, where it has one, times its
``scaling_factor``, which brings it near unit variance, as the flow needs; where its configuration has ``latents_mean``
and ``latents_std``, less the one of its channel and divided by the other. Images are float in [-1, 1].
"""

import contextlib
import hashlib
import json
import math
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import nn

from lfm_fast import ops
from lfm_fast.models import fast_autoencoder
from lfm_fast.models.small_vae import WEIGHTS_FILE, SmallVAE
from lfm_fast.ops.streams import STREAM_POSTERIOR

EMBEDDED_FOLDER = resources.files("lfm_fast") / "embedded"  # the flow and, in vae/, the VAE that ship with the package
PIXELS_AT_ONCE = {"cpu": 2**16, "cuda": 2**22}  # of the images that are computed at a time; one is, whatever its size
DEFAULT_HUB_NAME = "stabilityai/sd-vae-ft-mse"


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
    ``decode(z).sample`` and a ``scaling_factor`` in their configuration. It holds the weights, and is what is saved.
    Where a faster form of it is known (`lfm_fast.models.fast_autoencoder`), that one computes: on a CPU, and on CUDA
    where ``precision`` asks for it (`lfm_fast.optimize`), made anew when weights have changed: by PyTorch's count and,
    on a CPU, by sixteen numbers of each, which tell what is written through ``.data``, but not to a few numbers
    elsewhere. Batches are taken in parts, so that memory is bounded by the size of one image.
    """

    def __init__(self, network, name, precision=None):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.precision = name, precision
        config = network.config
        self.scaling_factor = float(config["scaling_factor"])
        self.shift_factor = float(config.get("shift_factor") or 0.0)  # SD3's and FLUX's VAEs have one
        self.latent_channels = int(config["latent_channels"])
        self.latents_mean, self.latents_std = _statistics(config, self.latent_channels)  # of each channel, or None
        self.downsampling = 2 ** (len(config["block_out_channels"]) - 1)
        self._faster = None  # (what it was made of, what computes, views of the weights, their numbers then)
        self._compiling = None  # torch.compile's options

    def optimized(self, precision="bf16", mode="inference"):
        """What `lfm_fast.optimize` makes of it: an ``Autoencoder`` on the same weights that computes in `precision`.

        Raises ValueError for a mode other than "inference", an unknown precision or one that the device does not have,
        and a network of which no faster form is known.
        """
        if mode != "inference":
            raise ValueError(f"mode is {mode!r}, and an autoencoder is for inference; leave mode out.")
        reason = fast_autoencoder.why_not(self.network, precision, next(self.network.parameters()).device)
        if reason is not None:
            raise ValueError(f"{reason}.")
        other = Autoencoder(self.network, self.name, precision)
        other.scaling_factor, other.shift_factor = self.scaling_factor, self.shift_factor
        return other

    def compile(self, **options):
        """Compute through torch.compile, with its options, from the next call on. For CUDA; never run on a GPU."""
        self._compiling, self._faster = options, None

    @property
    def dtype(self):
        return next(self.network.parameters()).dtype

    @property
    def fingerprint(self):
        """Twelve hex digits of a hash over all weights, and the statistics of its latents: which VAE made these."""
        digest = hashlib.sha256()
        for key, value in self.network.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if self.latents_std is not None:
            digest.update(json.dumps([self.latents_mean, self.latents_std]).encode())
        return digest.hexdigest()[:12]

    def unit(self, device=None):
        """(shift, scale) of z_0 = (z - shift) scale, z the network's own latent: numbers, or (C, 1, 1) tensors."""
        if self.latents_std is None:
            return self.shift_factor, self.scaling_factor
        mean, std = (torch.tensor(each, device=device).view(-1, 1, 1) for each in (self.latents_mean, self.latents_std))
        return mean, self.scaling_factor / std

    @torch.no_grad()
    def encode(self, images):
        """(B, 3, H, W) in [-1, 1] -> ``Posterior`` with (B, C, H / downsampling, W / downsampling) in latent units."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}; the autoencoder takes (B, 3, H, W)")
        if images.shape[2] % self.downsampling or images.shape[3] % self.downsampling:
            raise ValueError(
                f"images are {images.shape[2]}x{images.shape[3]}; both sides must be multiples of {self.downsampling}"
            )
        parts = self._parts(images, images.shape[2] * images.shape[3])
        found = [self._run("encode", part).latent_dist for part in parts]
        mean, log_variance = (torch.cat([getattr(x, name).float() for x in found]) for name in ("mean", "logvar"))
        shift, scale = self.unit(mean.device)
        return Posterior((mean - shift) * scale, log_variance + 2 * torch.log(torch.as_tensor(scale)))

    @torch.no_grad()
    def decode(self, latents):
        """(B, C, h, w) in latent units -> images (B, 3, H, W), float32, clamped to [-1, 1]."""
        if latents.ndim != 4 or latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; {self.name} decodes (B, {self.latent_channels}, h, w)"
            )
        pixels = latents.shape[2] * latents.shape[3] * self.downsampling**2
        shift, scale = self.unit(latents.device)
        parts = self._parts(latents / scale + shift, pixels)
        return torch.cat([self._run("decode", part).sample.float().clamp(-1, 1) for part in parts])

    def _parts(self, batch, pixels):
        """A batch, of images or of latents of so many pixels, in parts that are computed one after the other."""
        at_once = PIXELS_AT_ONCE["cuda" if batch.is_cuda else "cpu"]
        return batch.split(max(1, at_once // max(1, pixels)))

    def _run(self, name, x):
        network, dtype = self._network()
        x = x.to(dtype)
        if network is self.network:
            return getattr(network, name)(x)
        with network.products():
            return getattr(network, name)(x.contiguous(memory_format=torch.channels_last))

    def _network(self):
        """(the network that computes, the dtype it takes): made anew when a weight was changed or moved."""
        parameters = list(self.network.parameters())
        elsewhere = self.precision is None and parameters[0].device.type != "cpu"
        if elsewhere or self.dtype is not torch.float32 or any(p.is_inference() for p in parameters):
            return self.network, self.dtype
        if tiles := fast_autoencoder.why_not_in_tiles(self.network):  # it may be told so at any time
            if self.precision is not None:
                raise ValueError(f"{tiles}.")
            return self.network, self.dtype
        made_of = [(p.data_ptr(), p._version) for p in parameters]
        if self._faster is None or self._faster[0] != made_of or self._is_written_over():
            with torch.inference_mode(False), torch.no_grad():  # or its weights could not be packed
                views = _views_of(parameters)
                self._faster = made_of, self._made(), views, _bits(views)
        return self._faster[1]

    def _is_written_over(self):
        """Whether weights were changed behind PyTorch's back, through ``.data``."""
        views, before = self._faster[2:]
        return not torch.equal(_bits(views), before)

    def _made(self):
        precision = self.precision or "fp32"
        if self.precision is None and fast_autoencoder.why_not_of(self.network):
            return self.network, self.dtype
        network = fast_autoencoder.faster(self.network, precision)
        if self._compiling is not None:
            for name in ("encode", "decode"):
                setattr(network, name, torch.compile(getattr(network, name), **self._compiling))
        return network, fast_autoencoder.DTYPES[precision]

    def __getstate__(self):
        return {**self.__dict__, "_faster": None}  # a copy has weights of its own

    def save_pretrained(self, folder):
        """Write config.json and the weights into ``folder`` in diffusers' layout. Raises OSError if it cannot."""
        from safetensors import SafetensorError

        try:
            self.network.save_pretrained(folder)
        except SafetensorError as error:
            raise OSError(f"cannot write {folder}: {error}") from error


def _statistics(config, channels):
    """(latents_mean, latents_std) of a configuration, a number for each channel, or (None, None). Raises ValueError."""
    found = [config.get(name) for name in ("latents_mean", "latents_std")]
    if found == [None, None]:
        return None, None
    if config.get("shift_factor"):
        raise ValueError(
            "the autoencoder's config has latents_mean or latents_std beside a shift_factor; leave one out"
        )
    try:
        mean, std = ([float(value) for value in values] for values in found)
        known = len(mean) == len(std) == channels and min(std) > 0 and all(map(math.isfinite, mean + std))
    except (TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"the autoencoder's config has latents_mean {found[0]} and latents_std {found[1]}; expected {channels} "
            "numbers in each, those of latents_std above 0"
        )
    return mean, std


def _views_of(parameters) -> list[torch.Tensor]:
    """Up to sixteen numbers of each, evenly spread; none on a GPU, which would have to be waited for."""
    if parameters[0].device.type != "cpu":
        return [torch.empty(0)]
    return [p.detach().as_strided((min(16, p.numel()),), (max(1, p.numel() // 16),)) for p in parameters]


def _bits(views) -> torch.Tensor:
    return torch.cat(views).view(torch.int32)  # as numbers, NaN would differ from itself


def load_autoencoder(name_or_folder="embedded", device=None, precision=None):
    """An ``Autoencoder`` from the package ("embedded"), a local folder, or a name on the Hugging Face hub.

    ``precision`` is that of `lfm_fast.optimize`; None is float32, as ``Autoencoder`` says.

    A folder holds config.json and diffusion_pytorch_model.safetensors (diffusers' layout), or has them in a sub-folder
    ``vae``. Raises ValueError with one sentence where nothing usable is found.
    """
    found = _found(name_or_folder).to(device or "cpu")
    return found if precision is None else found.optimized(precision)


def _found(name_or_folder):
    if str(name_or_folder) == "embedded":
        return Autoencoder(SmallVAE.from_pretrained(EMBEDDED_FOLDER / "vae"), "embedded")
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return Autoencoder(_from_folder(folder), str(name_or_folder))
    if folder.is_absolute() or str(name_or_folder).startswith(".") or str(name_or_folder).count("/") != 1:
        raise ValueError(f"autoencoder folder {str(name_or_folder)!r} does not exist")
    return Autoencoder(_from_hub(str(name_or_folder)), str(name_or_folder))


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
