"""Inpainting: holes of a picture painted by a flow, one trained to look at masked images or any other."""

import math

import torch
import torch.nn.functional as F

from lfm_fast.data import open_images
from lfm_fast.data.encoding import device_of, to_model_range
from lfm_fast.data.latents import EncodedImages, drawn_images
from lfm_fast.data.masks import KINDS, SHARE, free_form, read_mask, to_latent
from lfm_fast.data.opening import held_out_split
from lfm_fast.flow.noise import check_indices
from lfm_fast.metrics.inpainting import filled_with_mean, hole_errors
from lfm_fast.models.conditioned import Conditioned
from lfm_fast.tasks.base import ConditionedSource, Task, concatenated
from lfm_fast.tasks.patches import FITS, Resized, Tiles, filled, read_picture
from lfm_fast.tasks.projection import project

APPROACHES = ("condition", "project", "project:resample")
RESAMPLINGS = 4  # of "project:resample": evaluations are multiplied by it
_UNUSED = {
    "condition": ("condition", "resamplings", "pieces"),
    "project": ("path", "t_start", "preview", "condition", "model_kwargs", "cuda_graph"),
}
_PER_FORWARD = 64


class Inpainting(Task):
    """The network sees, beside z_t, the latents of the image with a hole in it and the mask: see `condition_of`.

    Holes are drawn anew at every visit of an image (`lfm_fast.data.masks.free_form`), and the loss is over the whole
    picture: so the network learns what is known, too, and needs no other objective.

    Source: Dao et al., arXiv 2307.08698, section 4.3.
    """

    def images(self, config, split="train"):
        if config.conditions is not None:
            raise ValueError("masks are drawn at random in training; leave --conditions out")
        return super().images(config, split)

    def source(self, config, source, images, autoencoder):
        low = config.precision not in ("auto", "fp32", "tf32")
        return MaskedImages(source, images, autoencoder, bf16=low)

    def network(self, config, latent_shape):
        return concatenated(config, latent_shape, latent_shape[0] + 1)

    def example(self, config, count, latent_shape):
        return torch.zeros(count, latent_shape[0] + 1, *latent_shape[1:])

    def settings(self, config):
        return {"masks": KINDS[0], "share": list(SHARE)}

    def shown(self, source, sample_numbers, seed):
        images, holes = source.images_and_holes(sample_numbers, seed)
        return torch.where(holes[:, None], 0.5, images / 255.0), images / 255.0

    def finished(self, source, sample_numbers, seed, drawn):
        images, holes = source.images_and_holes(sample_numbers, seed)
        return torch.where(holes[:, None], drawn, images / 255.0)

    def evaluate(self, flow, *, num_images, seed, data, approach=None, **sampling):
        """PSNR and seams in holes of held-out images, beside those of simpler paintings: the mean colour of what is
        known; another of these images pasted into the hole, as a perfect flow would draw that did not look; and, of a
        flow that was not trained to inpaint, its own unconditional samples pasted."""
        images = open_images(data, flow.image_size, split="held_out" if data == "embedded" else held_out_split(data))
        count = min(num_images, len(images))
        if count < 2:
            what = f"num_images is {num_images}" if num_images < 2 else f"{data} has one image to evaluate with"
            raise ValueError(f"{what}; give 2 or more")
        truths = images.batch([k * len(images) // count for k in range(count)])
        holes = free_form(torch.arange(count), seed, flow.image_size)
        approach = checked_approach(flow, approach)
        painted = paint(flow, truths / 255.0, holes, torch.arange(count), seed, approach, sampling=sampling)
        figures = {"images": count, "share of holes": float(holes.double().mean())}
        compared = {"": painted, "mean colour: ": filled_with_mean(truths, holes)}
        compared["another image: "] = truths.roll(1, 0) / 255.0
        if approach != "condition":
            plain = {name: value for name, value in sampling.items() if name not in ("resamplings", "pieces")}
            compared["unconditional: "] = flow.sample(count, seed=seed, **plain)
        for name, pictures in compared.items():
            errors = hole_errors(pictures, truths / 255.0, holes)
            figures |= {f"{name}psnr": float(-20 * errors.rmse.square().mean().sqrt().log10())}
            figures |= {f"{name}seam": float(errors.seam.mean())}
        return figures | {"truth: seam": float(errors.seam_of_truth.mean())}

    def generated(self, flow, args, *, num_images, **sampling):
        if args.mask is None:
            raise ValueError("--image needs --mask: a picture of the same size, white where the hole is")
        return inpaint(
            flow,
            args.image,
            args.mask,
            num_samples=num_images,
            fit=args.fit or "resize",
            approach=args.approach,
            **sampling,
        )


class MaskedImages(ConditionedSource):
    """Training's latents and labels, and of each sample its image with a hole and the mask: images are read and holes
    drawn ahead, and encoded when they are asked for.

    Args:
        source, images: as of `ConditionedSource`.
        autoencoder: encodes the masked images, at every visit.
        bf16: encode them in bfloat16, for a network that reads them so anyway: on CPUs with matrix tiles six times
            faster, and an error of 0.004, the rounding of bfloat16 itself.
    """

    def __init__(self, source, images, autoencoder, *, bf16=False):
        super().__init__(source, images)
        self.autoencoder, self.bf16, self._latest = autoencoder, bf16, None

    def batch(self, sample_numbers, seed):
        """z_0 (B, C, h, w) and y (B,), as of the source; images that it would have to read are read once for both."""
        if not isinstance(self._source, EncodedImages):
            return self._source.batch(sample_numbers, seed)
        images, items, _ = self._get(sample_numbers, seed)
        return self._source.of_images(images, items, sample_numbers, seed)

    def condition(self, sample_numbers, seed):
        """`condition_of` these samples, (B, C + 1, h, w), on the autoencoder's device."""
        images, _, holes = self._get(sample_numbers, seed)
        device = device_of(self.autoencoder)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            return condition_of(self.autoencoder, to_model_range(images, device), holes)

    def images_and_holes(self, sample_numbers, seed):
        """(images (B, 3, H, W) uint8, holes (B, H, W) bool) of these samples."""
        images, _, holes = self._read(sample_numbers, seed)
        return images, holes

    def _get(self, sample_numbers, seed):
        latest = self._latest
        if latest is None or latest[0] != seed or not torch.equal(latest[1], sample_numbers):
            self._latest = latest = (seed, sample_numbers.clone(), self._ahead.get(sample_numbers, seed))
        return latest[2]

    def _read(self, sample_numbers, seed):
        images, items = drawn_images(self._images, sample_numbers, seed, self._source.flip)
        return images, items, free_form(sample_numbers, seed, images.shape[-1])


def condition_of(autoencoder, images, holes):
    """What a network trained for inpainting is conditioned on: (B, C + 1, h, w) float32.

        condition = (latents of image (1 - hole), hole in {-1, 1} of the nearest pixel)

    images (B, 3, H, W) in [-1, 1] on the autoencoder's device, holes (B, H, W) bool. The latents are the means.
    """
    holes = holes.to(images.device)
    latents = autoencoder.encode(images * ~holes[:, None]).mode()
    return torch.cat([latents, to_latent(holes, latents.shape[2:])], dim=1)


def approach_of(flow):
    """The approach that suits a flow: "condition" where its network takes masked latents and a mask, else "project".

    Raises ValueError for a network that is conditioned on something else.
    """
    model = flow.model
    if not getattr(model, "needs_condition", False):
        return "project"
    if isinstance(model, Conditioned) or model.in_channels != 2 * flow.autoencoder.latent_channels + 1:
        raise ValueError("this flow is conditioned on something else than a masked image; inpaint with another one")
    return "condition"


def inpaint(
    flow,
    image,
    mask,
    *,
    num_samples=1,
    seed=0,
    fit="resize",
    approach=None,
    y=None,
    hole=255,
    batch_size=None,
    indices=None,
    **sampling,
):
    """Paint the holes of a picture in num_samples ways: (num_samples, 3, H, W) float32 in [0, 1] on the CPU.

    What is not in a hole is the picture's own, to the bit; what the picture has in its holes makes no difference.

    Args:
        flow: a LatentFlow.
        image: a file, a PIL image, or an array or tensor (H, W, 3) or (3, H, W), uint8 or floats in [0, 1].
        mask: of the same height and width: a file, a PIL image, or (H, W) of bool, integers or floats
            (`lfm_fast.data.masks.read_mask`).
        seed: sample i depends on the seed and i alone.
        fit: how a picture of another size than the network's comes to it. "resize": squeezed into its square, and what
            is painted stretched again; "tile": in squares at its own size, one after the other, half overlapping, so
            that large holes close from their edges; "refuse": not at all.
        approach: "condition" by a network trained for it; with any unconditional or labelled one "project", whose
            state follows the path to what is known, and "project:resample", which goes back and through every tenth of
            the times 4 times for better agreement (`lfm_fast.tasks.projection`). None takes what suits the flow.
        y: a label of all samples, or one each, of a labelled flow.
        hole: 255 where white is the hole, 0 where black is.
        batch_size: samples at a time; None makes it 64.
        indices: (num_samples,) int64 sample numbers instead of 0, 1, ...
        sampling: arguments of `LatentFlow.sample`; with "project:resample" also resamplings and pieces.

    Raises ValueError, in one sentence, for pictures and masks that are none or do not go together, a mask with no hole
    or nothing else, and an approach that the flow cannot take.

    Source: Dao et al., arXiv 2307.08698, section 4.3 (condition); Lugmayr et al., arXiv 2201.09865 (project).
    """
    _check_settings(fit, num_samples, batch_size)
    approach = checked_approach(flow, approach)
    _refuse_unused(approach, sampling)
    indices = torch.arange(num_samples) if indices is None else indices
    check_indices(indices, num_samples)
    picture, holes = read_picture(image), read_mask(mask, hole=hole)
    _check_together(picture, holes, fit, flow.image_size)
    images = filled(picture[None], holes[None])  # one until the samples differ, so that it is encoded once
    cutter = Tiles if fit == "tile" else Resized
    for number, part, cut, paste in cutter(holes, flow.image_size).squares():
        squares = cut(images)
        own = indices + (number << 32)  # no two squares of a picture start from the same noise
        parts = part.expand(len(squares), -1, -1)
        images = paste(images, paint(flow, squares, parts, own, seed, approach, y, batch_size, sampling))
    return images


def paint(flow, images, holes, indices, seed, approach, y=None, batch_size=None, sampling=None):
    """The holes (B, H, W) of images (B, 3, H, W) in [0, 1] of the flow's own size painted: (N, 3, H, W) in [0, 1].

    Image i starts from the noise of number indices[i], (N,); B is N, or 1 for all samples to be of one image. The rest
    of the arguments as of `inpaint`. What is not in a hole is as the autoencoder gives it back.
    """
    sampling, device = dict(sampling or {}), device_of(flow.autoencoder)
    encode = condition_of if approach == "condition" else _known_latents
    parts = zip(images.split(_PER_FORWARD), holes.split(_PER_FORWARD))
    encoded = torch.cat([encode(flow.autoencoder, 2 * x.to(device) - 1, hole.to(device)) for x, hole in parts])
    if approach == "condition":
        settings = {**sampling, "seed": seed, "indices": indices, "batch_size": batch_size, "condition": encoded}
        return flow.sample(len(indices), y, **settings)
    sampling = {name: value for name, value in sampling.items() if name not in _UNUSED["project"]}  # are None
    if approach == "project:resample":
        sampling.setdefault("resamplings", RESAMPLINGS)
    labels, encoded, painted = flow.labels(y, len(indices)), encoded.expand(len(indices), -1, -1, -1), []
    for rows in torch.arange(len(indices)).split(batch_size or _PER_FORWARD):
        settings = {**_of_rows(sampling, rows, len(indices)), "seed": seed, "indices": indices[rows]}
        settings["y"] = None if labels is None else labels[rows].to(device)
        painted.append(_project(flow, encoded[rows], settings))
    return torch.cat(painted)


def _known_latents(autoencoder, images, holes):
    """Latents of the images in [-1, 1], NaN where they are not known: (B, C, h, w)."""
    latents = autoencoder.encode(filled(images, holes)).mode()
    return latents.masked_fill(F.max_pool2d(holes[:, None].float(), autoencoder.downsampling) > 0, math.nan)


def _project(flow, z_0, settings):
    known = ~z_0[:, :1].isnan()
    arguments = {**flow.defaults(settings["y"], settings.get("guidance")), **settings}
    return flow.decode(project(flow.model.eval(), z_0, known, path=flow.path, **arguments))


def _of_rows(sampling, rows, count):
    """The settings with what has one entry for each of `count` samples cut to those of `rows`."""
    scale, guidance = sampling.get("guidance_scale"), sampling.get("guidance")
    if isinstance(scale, torch.Tensor) and scale.shape == (count,):
        sampling = {**sampling, "guidance_scale": scale[rows.to(scale.device)]}
    if getattr(guidance, "num_samples", None) == count:
        sampling = {**sampling, "guidance": guidance.part(rows)}
    return sampling


def _refuse_unused(approach, sampling):
    """Raise ValueError for a setting that this approach would not look at, before a picture is read."""
    for name in _UNUSED[approach.partition(":")[0]]:
        if sampling.get(name) is not None and sampling[name] is not False:
            raise ValueError(f"{name} cannot be given to approach {approach!r}; leave it out")


def _check_settings(fit, num_samples, batch_size):
    """Raise ValueError for what can be told before a picture is looked at."""
    for name, value in (
        ("num_samples", num_samples),
        ("batch_size", _PER_FORWARD if batch_size is None else batch_size),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be an integer from 1 on")
    if fit not in FITS:
        raise ValueError(f"fit is {fit!r}; there is {', '.join(FITS)}")


def checked_approach(flow, approach=None):
    """The approach to take with a flow, None being what suits it. Raises ValueError for one that it cannot take."""
    if approach is not None and approach not in APPROACHES:
        raise ValueError(f"approach is {approach!r}; there is {', '.join(APPROACHES)}")
    own = approach_of(flow)
    if approach is None or approach.partition(":")[0] == own:
        return approach or own
    if own == "condition":
        raise ValueError(f"approach is {approach!r}, but this flow was trained to inpaint; leave approach out")
    raise ValueError("approach is 'condition', but this flow was not trained to inpaint; use 'project'")


def _check_together(picture, holes, fit, side):
    height, width = picture.shape[1:]
    if holes.shape != (height, width):
        raise ValueError(
            f"the mask has {holes.shape[0]}x{holes.shape[1]} pixels and the image {height}x{width}; give them one size"
        )
    if not holes.any():
        raise ValueError("the mask has no hole, so there is nothing to paint; hole=0 takes black pixels for the hole")
    if holes.all():
        raise ValueError("the mask is one hole, so that nothing is known of the image; draw one by LatentFlow.sample")
    if fit == "refuse" and (height, width) != (side, side):
        raise ValueError(
            f"the image has {height}x{width} pixels and the flow {side}x{side}; fit='resize' or 'tile' takes any size"
        )
