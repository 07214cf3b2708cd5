"""Noise becomes an image: the network, its path and its autoencoder as one object that is loaded, sampled and saved."""

import difflib
import operator
from dataclasses import dataclass, field

import torch

from lfm_fast.autoencoder import Autoencoder
from lfm_fast.flow.checks import describe
from lfm_fast.flow.noise import noise
from lfm_fast.flow.paths import Linear
from lfm_fast.flow.paths import Path as ProbabilityPath
from lfm_fast.guidance import ClassifierGuidance
from lfm_fast.models.conditioned import Conditioned, taken_apart
from lfm_fast.pipeline import folders
from lfm_fast.pipeline.preview import Preview
from lfm_fast.pipeline.replays import Replays
from lfm_fast.sampling import sample
from lfm_fast.solvers.grids import is_table, time_grid


@dataclass
class LatentFlow:
    """A trained latent flow: z_1 ~ N(0, I), dz/dt = v(t, z, y) from t = 1 to t = 0, image = decode(z_0).

    Attributes:
        model: the velocity network, called model(t, z, y).
        autoencoder: turns latents (B, C, h, w) into images and back.
        path: the probability path the network was trained on.
        class_names: names of the labels, empty when there are none.
        sampling: arguments of `lfm_fast.sample` that suit this network; `sample` uses them unless told otherwise.
        task: what it was trained to do and with which settings, as its checkpoints say: {"name": "inpainting", ...}.

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
    task: dict = field(default_factory=dict)
    _replays: Replays = field(default_factory=Replays, init=False, repr=False, compare=False)

    def __post_init__(self):
        self.class_names = tuple(self.class_names)
        channels = self.model.out_channels
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
        return (self.model.out_channels, self.model.image_size, self.model.image_size)

    @property
    def image_size(self):
        """Side of the images in pixels."""
        return self.model.image_size * self.autoencoder.downsampling

    def to(self, device):
        """Move network and autoencoder; returns self."""
        self.model.to(device)
        self.autoencoder.to(device)
        return self

    def sample(
        self,
        num_images,
        y=None,
        seed=0,
        batch_size=None,
        indices=None,
        preview=None,
        condition=None,
        cuda_graph=False,
        **sampling,
    ):
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
            condition: of a conditioned network, what it is conditioned on: a tensor with one entry for each image, or
                with one for all. Which tensor its task says (docs/tasks.md); `inpaint`, `from_semantic_map` and
                `from_layout` make it.
            cuda_graph: record all steps of a batch into one CUDA graph and replay it for the others, here and in later
                calls with the same arguments (`lfm_fast.Sampler`). For methods of fixed steps, on CUDA. Opt-in, because
                it was never run on a GPU so far.
            sampling: arguments of `lfm_fast.sample` (method, num_steps, guidance_scale, t_end, ...); path is this
                flow's own, and t_start is 1. A guidance_scale of shape (num_images,), of a guidance object too, goes
                image by image. A guidance object takes the place of this flow's own guidance_scale.

        Raises ValueError for a count below 1, unknown labels, a condition that is missing or not asked for, and
        whatever `lfm_fast.sample` refuses.
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
        condition = self._condition(condition, num_images)
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
            given = None if condition is None else condition[part].to(self.device)
            model, entries = taken_apart(self.model, given)
            if entries:
                arguments["model_kwargs"] = {**(sampling.get("model_kwargs") or {}), **entries}
            if preview is not None:
                arguments["callback"] = Preview(preview, self, z_1, {**arguments, "callback": sampling.get("callback")})
            arguments |= {"y": part_y, "indices": indices[part]}
            if cuda_graph:
                z_0 = self._replays.sample(model, z_1, min(batch_size or 64, num_images), **arguments)
            else:
                z_0 = sample(model, z_1, **arguments)
            images.append(self.decode(z_0))
        return torch.cat(images)

    def inpaint(self, image, mask, **settings):
        """Paint the holes of a picture, (num_samples, 3, H, W) in [0, 1]: see `lfm_fast.tasks.inpainting.inpaint`.

        image: a file, PIL image, array or tensor of any size; mask: the same, white (True, 1, 255) where the hole is.
        settings: num_samples, seed, fit ("resize", "tile" or "refuse"), approach ("condition", "project" or
        "project:resample"), y, and arguments of `sample`.
        """
        from lfm_fast.tasks.inpainting import inpaint

        return inpaint(self, image, mask, **settings)

    def from_semantic_map(self, label_map, num_samples=1, seed=0, **options):
        """Draw images for a label map: see `lfm_fast.tasks.semantic.from_semantic_map`."""
        from lfm_fast.tasks.semantic import from_semantic_map

        return from_semantic_map(self, label_map, num_samples, seed, **options)

    def from_layout(self, boxes, num_samples=1, seed=0, **options):
        """Draw images with things in the boxes asked for: see `lfm_fast.tasks.layout.from_layout`."""
        from lfm_fast.tasks.layout import from_layout

        return from_layout(self, boxes, num_samples, seed, **options)

    def decode(self, z_0):
        """Images (B, 3, H, W) in [0, 1] on the CPU of latents (B, C, h, w)."""
        return (self.autoencoder.decode(z_0).cpu() + 1) / 2

    def _condition(self, condition, num_images):
        """One entry for each image, or None. Raises ValueError for a network that is conditioned otherwise."""
        wanted = getattr(self.model, "needs_condition", False)
        if condition is None:
            if wanted:
                raise ValueError(
                    f"this flow is conditioned ({self.task.get('name', 'on what it was trained with')}); "
                    "give condition, or call inpaint, from_semantic_map or from_layout"
                )
            return None
        if not wanted:
            raise ValueError("this flow takes no condition; leave condition out")
        if not isinstance(condition, torch.Tensor) or not condition.ndim or len(condition) not in (1, num_images):
            raise ValueError(
                f"condition is {describe(condition)}, expected a tensor with one entry for each of "
                f"{num_images} images, or with one for all"
            )
        if isinstance(self.model, Conditioned):
            self.model.encoder.check(condition, len(condition))
        return condition.expand(num_images, *condition.shape[1:])

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
        count = self.model.num_classes
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
                raise ValueError(f"there is no class {value!r}{self._nearest(value)}; there is {self._classes()}")
            return folded.index(value.casefold())
        try:
            label = int(value) if isinstance(value, str) else operator.index(value)
        except TypeError as error:
            raise ValueError(f"label {value!r} is neither a name nor an index") from error
        if not 0 <= label < count:
            raise ValueError(f"label {value} is out of range: the network knows 0 to {count - 1}")
        return label

    def _nearest(self, value):
        """The classes that may have been meant, as words for the sentence about one that there is not."""
        names = {name.casefold(): name for name in self.class_names}
        begun = [name for name in names if name.startswith(value.casefold())]
        near = (begun or difflib.get_close_matches(value.casefold(), names))[:3]
        return f" (nearest: {', '.join(names[name] for name in near)})" if near else ""

    def _classes(self, most=20):
        names, more = ", ".join(self.class_names[:most]), len(self.class_names) - most
        return f"{names} and {more} more" if more > 0 else names or "none by name"

    def save_pretrained(self, folder, dtype=torch.float32, as_diffusers=False):
        """Write model_index.json, transformer/ (a U-Net: unet/) and vae/ into `folder`, diffusers' layout.

        dtype: of the network's weights. as_diffusers: a DiT as diffusers' own DiTTransformer2DModel, which is read back
        here as well. A flow that is there already stays whole until the new one is on the disk, and is replaced then.
        Raises ValueError for a dtype that is not floating and a network that cannot be written so, OSError where
        `folder` cannot be written.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}; weights are saved in a floating-point type")
        folders.write(self, folder, dtype, as_diffusers)

    @classmethod
    def from_pretrained(cls, source, autoencoder=None, device=None, model=None):
        """Load from "embedded", a folder that `save_pretrained` wrote, a training run's folder, or a checkpoint file.

        Args:
            source: any of these. A run's folder gives its newest checkpoint that can be read. `.pth` files are LFM's,
                as is a folder of `model_<epoch>.pth`, of which the highest epoch is taken, or one above a single such
                folder (saved_info/latent_flow/<dataset>/<experiment>).
            autoencoder: an `Autoencoder`, or a name or folder for `load_autoencoder`; None takes the one recorded with
                the weights, and for LFM's files, which record none, stabilityai/sd-vae-ft-mse.
            device: where to put it; None is the CPU.
            model: the network of weights that do not tell which it is; they are copied into it.

        Raises ValueError with one sentence when nothing usable is there.
        """
        flow = cls(**folders.read(source, autoencoder, model))
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
