"""Noise becomes an image: the network, its path and its autoencoder as one object that is loaded, sampled and saved."""

import json
import operator
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lfm_fast import __version__
from lfm_fast.autoencoder import DEFAULT_HUB_NAME, EMBEDDED_FOLDER, WEIGHTS_FILE, Autoencoder, load_autoencoder
from lfm_fast.checkpoint import (
    atomic_write,
    load_checkpoint,
    read_metadata,
    replace_files,
    run_checkpoints,
    save_weights,
)
from lfm_fast.flow.noise import noise
from lfm_fast.flow.paths import Linear, describe, make_path
from lfm_fast.flow.paths import Path as ProbabilityPath
from lfm_fast.guidance import ClassifierGuidance
from lfm_fast.models import from_config
from lfm_fast.sampling import sample
from lfm_fast.solvers.grids import is_table, time_grid

INDEX = "model_index.json"


@dataclass
class LatentFlow:
    """A trained latent flow: z_1 ~ N(0, I), dz/dt = v(t, z, y) from t = 1 to t = 0, image = decode(z_0).

    Attributes:
        model: the velocity network, called model(t, z, y).
        autoencoder: turns latents (B, C, h, w) into images and back.
        path: the probability path the network was trained on.
        class_names: names of the labels, empty when there are none.
        sampling: arguments of `lfm_fast.sample` that suit this network; `sample` uses them unless told otherwise.

    >>> flow = lfm_fast.LatentFlow.from_pretrained("embedded")
    >>> flow.sample(2, y=[0, 8], num_steps=4).shape
    torch.Size([2, 3, 64, 64])

    Source: Dao et al., "Flow Matching in Latent Space", arXiv 2307.08698.
    """

    model: torch.nn.Module
    autoencoder: Autoencoder
    path: ProbabilityPath = field(default_factory=Linear)
    class_names: tuple[str, ...] = ()
    sampling: dict = field(default_factory=dict)

    def __post_init__(self):
        self.class_names = tuple(self.class_names)
        channels = self.model.config["in_channels"]
        if channels != self.autoencoder.latent_channels:
            raise ValueError(
                f"the network works on {channels} latent channels, but the autoencoder {self.autoencoder.name} has "
                f"{self.autoencoder.latent_channels}; give the autoencoder that the network was trained with"
            )

    @property
    def device(self):
        return next(self.model.parameters()).device

    @property
    def latent_shape(self):
        """(C, h, w) of one latent."""
        config = self.model.config
        return (config["in_channels"], config["image_size"], config["image_size"])

    @property
    def image_size(self):
        """Side of the images in pixels."""
        return self.model.config["image_size"] * self.autoencoder.downsampling

    def to(self, device):
        """Move network and autoencoder; returns self."""
        self.model.to(device)
        self.autoencoder.to(device)
        return self

    def sample(self, num_images, y=None, seed=0, batch_size=None, indices=None, preview=None, **sampling):
        """Draw images, (num_images, 3, H, W) float32 in [0, 1] on the CPU.

        Image i depends on (seed, i, y[i]) alone, whatever the batch size (up to the rounding of matrix products, for
        fixed-step methods).

        Args:
            num_images: how many.
            y: labels: None (unconditional), one label for all, or one for each image; names or indices.
            seed: of the noise.
            batch_size: images integrated and decoded at a time; None makes it 64.
            indices: (num_images,) int64 sample numbers instead of 0, 1, ...
            preview: called as preview(step, t, images) after each step of a batch, images (B, 3, H, W) in [0, 1] being
                what it comes to if the flow goes straight on: the data that the last step's velocity points at. Each
                is decoded. Returning exactly False ends the batch where it is, as with a callback.
            sampling: arguments of `lfm_fast.sample` (method, num_steps, guidance_scale, t_end, ...); path is this
                flow's own, and t_start is 1. A guidance_scale of shape (num_images,), of a guidance object too, goes
                image by image. A guidance object takes the place of this flow's own guidance_scale.

        Raises ValueError for a count below 1, unknown labels, and whatever `lfm_fast.sample` refuses.
        """
        _check_count("num_images", num_images)
        if batch_size is not None:
            _check_count("batch_size", batch_size)
        if preview is not None and not callable(preview):
            raise ValueError(f"preview is {preview!r}, expected a function preview(step, t, images)")
        for name in ("trajectory", "return_stats", "path", "t_start"):
            if sampling.get(name):
                raise ValueError(
                    f"{name} is for lfm_fast.sample on latents; here the flow's own path leads from noise to images"
                )
        guidance = sampling.get("guidance")
        arguments = {**self.defaults(y, guidance), **sampling, "path": self.path, "seed": seed}
        scale = arguments.get("guidance_scale")
        one_each = isinstance(scale, torch.Tensor) and scale.shape == (num_images,)
        _check_start(arguments, self.path)
        labels = self.labels(y, num_images, of_classifier=isinstance(guidance, ClassifierGuidance))
        indices = _sample_numbers(indices, num_images)
        self.model.eval()
        images = []
        for part in torch.arange(num_images).split(batch_size or 64):
            z_1 = noise(len(part), self.latent_shape, seed=seed, indices=indices[part], device=self.device)
            part_y = None if labels is None else labels[part].to(self.device)
            if one_each:
                arguments["guidance_scale"] = scale[part].to(self.device)
            if getattr(guidance, "num_samples", None) == num_images:
                arguments["guidance"] = guidance.part(part)
            z_1 = self.path.prior(z_1)
            if preview is not None:
                arguments["callback"] = _Preview(
                    preview, self, z_1, {**arguments, "callback": sampling.get("callback")}
                )
            z_0 = sample(self.model, z_1, y=part_y, indices=indices[part], **arguments)
            images.append(self._decode(z_0))
        return torch.cat(images)

    def _decode(self, z_0):
        return (self.autoencoder.decode(z_0).cpu() + 1) / 2

    def defaults(self, y, guidance=None):
        """The arguments of `lfm_fast.sample` that suit this network; without labels y there is no guidance, and a
        guidance object has its own scale."""
        null_label = self.model.null_label if y is not None else None
        defaults = {"null_label": null_label, **self.sampling}
        if y is None or null_label is None or guidance is not None:
            defaults.pop("guidance_scale", None)
            defaults.pop("guidance_interval", None)
        return defaults

    def labels(self, y, num_images, of_classifier=False):
        """Names or indices, one or many -> (num_images,) int64; None stays None. Raises ValueError for unknown ones.

        of_classifier: they are a classifier's, of which a network trained without labels need know none.
        """
        if y is None:
            return None
        count = self.model.config["num_classes"]
        if not count and not of_classifier:
            raise ValueError("this network was trained without labels; leave y out")
        count = count or torch.iinfo(torch.int64).max
        given = y.tolist() if hasattr(y, "tolist") else y  # of PyTorch or NumPy
        given = list(given) if isinstance(given, (list, tuple)) else [given] * num_images
        if len(given) != num_images:
            raise ValueError(f"y holds {len(given)} labels for {num_images} images; give one, or one for each")
        return torch.tensor([self._label(value, count) for value in given], dtype=torch.int64)

    def _label(self, value, count):
        if isinstance(value, str) and not value.isdecimal():
            folded = [name.casefold() for name in self.class_names]
            if value.casefold() not in folded:
                raise ValueError(
                    f"there is no class {value!r}; there is {', '.join(self.class_names) or 'none by name'}"
                )
            return folded.index(value.casefold())
        try:
            label = int(value) if isinstance(value, str) else operator.index(value)
        except TypeError as error:
            raise ValueError(f"label {value!r} is neither a name nor an index") from error
        if not 0 <= label < count:
            raise ValueError(f"label {value} is out of range: the network knows 0 to {count - 1}")
        return label

    def save_pretrained(self, folder, dtype=torch.float32):
        """Write model_index.json, transformer/ and vae/ into `folder` (diffusers' layout); `dtype` of the weights.

        A flow that is there already stays whole until the new one is on the disk, and is replaced then. Raises
        ValueError for a dtype that is not floating, OSError where `folder` cannot be written.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; weights are saved in a floating-point type")
        index = {
            "_class_name": "LatentFlow",
            "_lfm_fast_version": __version__,
            "transformer": ["lfm_fast", "DiT"],
            "vae": _component(self.autoencoder.network),
            "path": describe(self.path),
            "class_names": list(self.class_names),
            "sampling": self.sampling,
        }
        weights = {key: value.to(dtype) for key, value in self.model.state_dict().items()}
        with replace_files(folder, last=INDEX) as temporary:
            save_weights(temporary / "transformer" / WEIGHTS_FILE, weights)
            _write_json(temporary / "transformer" / "config.json", {"_class_name": "DiT", **self.model.config})
            self.autoencoder.save_pretrained(temporary / "vae")
            _write_json(temporary / INDEX, index)

    @classmethod
    def from_pretrained(cls, source, autoencoder=None, device=None):
        """Load from "embedded", a folder that `save_pretrained` wrote, a training run's folder, or a checkpoint file.

        Args:
            source: any of these. A run's folder gives its newest checkpoint that can be read; `.pth` files are LFM's.
            autoencoder: an `Autoencoder`, or a name or folder for `load_autoencoder`; None takes the one recorded with
                the weights, and for LFM's files, which record none, stabilityai/sd-vae-ft-mse.
            device: where to put it; None is the CPU.

        Raises ValueError with one sentence when nothing usable is there.
        """
        folder = EMBEDDED_FOLDER if str(source) == "embedded" else Path(source).expanduser()
        if (folder / INDEX).is_file():
            flow = _from_folder(cls, folder, autoencoder)
        elif folder.is_dir():
            flow = _from_checkpoint(cls, *_newest_whole(folder), autoencoder)
        else:
            flow = _from_checkpoint(cls, folder, load_checkpoint(folder), autoencoder)
        flow.model.eval()
        return flow.to(device) if device is not None else flow


def _check_start(arguments, path):
    """Times of one's own have to begin where there is next to nothing but noise, which is what they start from."""
    grid = arguments.get("time_grid")
    if not is_table(grid):
        return
    start = time_grid(grid, 50, t_end=arguments.get("t_end", 0.0), path=path)[0]
    there, noise_alone = (float(path.sigma(torch.tensor(t, dtype=torch.float64))) for t in (start, path.t_max))
    if there < 0.8 * noise_alone:
        raise ValueError(
            f"time_grid begins at t = {start:g}, where there is {there / noise_alone:.0%} of the noise that images are "
            f"drawn from; begin near t = {path.t_max:g}"
        )


class _Preview:
    """A callback of `sample` that shows where the batch is going, and calls the user's own first."""

    def __init__(self, show, flow, z_1, arguments):
        self.show, self.flow, self.arguments, self.callback = show, flow, arguments, arguments.get("callback")
        self.t, self.z, self.data = None, z_1, z_1

    def __call__(self, step, t, z):
        if self.callback is not None and self.callback(step, t, z) is False:
            return False
        now = torch.as_tensor(t, dtype=torch.float64).expand(len(z))  # one for all, or each sample's own
        dt = (now - (self._start() if self.t is None else self.t)).to(z).view(-1, *[1] * (z.ndim - 1))
        # a sample whose time stands still has arrived, or its attempt was refused: what was known of it holds
        moved = dt != 0
        velocity = (z - self.z) / torch.where(moved, dt, 1)
        self.data = torch.where(moved, self.flow.path.data_from_velocity(velocity, z, now.to(z)), self.data)
        self.t, self.z = now, z.clone()
        return self.show(step, t, self.flow._decode(self.data))

    def _start(self):
        """The time at which the state begins to move: a grid's first, or a later one that the guidance waits for."""
        grid, num_steps = self.arguments.get("time_grid"), self.arguments.get("num_steps", 50)
        grid = "lfm" if grid is None and self.arguments.get("compat") == "lfm" else grid
        times = time_grid(grid, num_steps, t_end=self.arguments.get("t_end", 0.0), path=self.flow.path)
        return times[getattr(self.arguments.get("guidance"), "zero_steps", 0)]


def _check_count(name, value):
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer from 1 on")


def _sample_numbers(indices, num_images):
    if indices is None:
        return torch.arange(num_images)
    try:
        indices = torch.as_tensor(indices)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"indices are {indices!r}; expected ({num_images},) int64 numbers from 0 on") from None
    if indices.shape != (num_images,) or indices.dtype != torch.int64 or (indices < 0).any():
        raise ValueError(
            f"indices are {tuple(indices.shape)} {indices.dtype}; expected ({num_images},) int64 numbers from 0 on"
        )
    return indices


def _component(network):
    return [type(network).__module__.split(".")[0], type(network).__name__]


def _write_json(path, content):
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _opened(autoencoder, otherwise):
    if isinstance(autoencoder, Autoencoder):
        return autoencoder
    return load_autoencoder(otherwise if autoencoder is None else autoencoder)


def _from_folder(cls, folder, autoencoder):
    index = _read_json(folder / INDEX, "path", "class_names", "sampling")
    config = _read_json(folder / "transformer" / "config.json", "family")
    model = from_config({key: value for key, value in config.items() if not key.startswith("_")})
    model = load_checkpoint(folder / "transformer" / WEIGHTS_FILE, model)
    if autoencoder is None and not (folder / "vae").is_dir():
        raise ValueError(f"{folder} has no folder vae; give the autoencoder by name or folder")
    autoencoder = _opened(autoencoder, "embedded" if folder == EMBEDDED_FOLDER else folder / "vae")
    return cls(model, autoencoder, make_path(**index["path"]), index["class_names"], index["sampling"])


def _read_json(path, *needed):
    """The object in a JSON file. Raises ValueError, naming the file, for anything else and where a name is missing."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; the folder is incomplete")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    missing = [name for name in needed if not isinstance(content, dict) or name not in content]
    if missing:
        raise ValueError(f"{path} holds no {', '.join(missing)}; save the flow again")
    return content


def _newest_whole(folder):
    """(path, network) of a run's newest checkpoint that can be read; each one passed over gets a warning."""
    files = run_checkpoints(folder)
    if not files:
        raise ValueError(
            f"{folder} holds neither {INDEX} nor a checkpoint of a training run (checkpoints/*.safetensors)"
        )
    for path in files:
        try:
            return path, load_checkpoint(path)
        except ValueError as error:
            damage = error
            warnings.warn(f"skipping a checkpoint that cannot be read ({error})", stacklevel=3)
    raise ValueError(f"{folder}: none of its checkpoints can be read ({damage})")


def _from_checkpoint(cls, path, model, autoencoder):
    recorded = read_metadata(path).get("flow") if path.suffix == ".safetensors" else None
    if recorded is None:  # weights alone, LFM's among them: the paper's path and autoencoder
        return cls(model, _opened(autoencoder, DEFAULT_HUB_NAME), Linear(sigma_min=1e-5))
    return cls(
        model,
        _opened(autoencoder, recorded["autoencoder"]),
        make_path(**recorded["path"]),
        recorded["class_names"],
        recorded["sampling"],
    )
