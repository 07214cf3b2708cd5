"""Semantic synthesis: pictures whose parts are where a label map puts them."""

import torch
from torch import Tensor, nn

from lfm_fast.data import label_maps, open_images
from lfm_fast.data.mapped_images import MappedImages
from lfm_fast.data.opening import palette_of
from lfm_fast.data.order import item_of
from lfm_fast.data.palettes import get_palette
from lfm_fast.metrics.segmentation import map_agreement
from lfm_fast.models.conditioned import Conditioned
from lfm_fast.models.label_map_encoder import LabelMapEncoder
from lfm_fast.tasks.base import ConditionedSource, Task, concatenated

CHANNELS = 4  # that a label map is encoded in, beside the latent's


class Semantic(Task):
    """The condition is a label map in pixels, (B, H, W) int64; a trained encoder puts it beside the latents."""

    def images(self, config, split: str = "train") -> MappedImages:
        """The images with a label map: the embedded set's own, or those of the folder `conditions` by name."""
        return MappedImages(super().images(config, split), _palette(config), config.conditions)

    def source(self, config, source, images, autoencoder):
        """`source` with condition(sample_numbers, seed) -> (B, H, W) int64. Raises ValueError for unusable maps."""
        images.check_maps()
        return MappedLatents(source, images)

    def network(self, config, latent_shape) -> nn.Module:
        """The network of the settings behind an encoder of label maps; an untrained one with compat="lfm"."""
        encoder = LabelMapEncoder(
            num_classes=len(_palette(config)),
            downsampling=config.image_size // latent_shape[1],
            out_channels=CHANNELS,
            frozen=config.compat == "lfm",
        )
        return Conditioned(network=concatenated(config, latent_shape, CHANNELS), encoder=encoder)

    def example(self, config, count: int, latent_shape) -> Tensor:
        """Label maps of one class."""
        return torch.zeros(count, config.image_size, config.image_size, dtype=torch.int64)

    def settings(self, config) -> dict:
        """The palette's name."""
        return {"palette": _palette(config).name}

    def shown(self, source, sample_numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Label maps in their colours, and the images they belong to."""
        drawn = label_maps.draw(source.condition(sample_numbers, seed), source.palette)
        return drawn.float() / 255, source.pictures(sample_numbers, seed).float() / 255

    def generated(self, flow, args, **sampling) -> Tensor:
        """Images for the label map in the file `args.label_map`."""
        sampling["num_samples"] = sampling.pop("num_images")
        return from_semantic_map(flow, args.label_map, **sampling)

    def evaluate(self, flow, *, num_images: int, seed: int, data: str, **sampling) -> dict[str, float]:
        """Mean IoU and pixel accuracy of samples, segmented by nearest colour, with the held-out maps they are for.

        Beside them the same of other maps, which is what a flow reaches that does not look at its map, and of the
        autoencoder's reconstructions, which is what any flow on its latents can reach.
        """
        palette = _palette_of(flow)
        if num_images < 2:  # every map is held against another one, too
            raise ValueError(f"num_images is {num_images}; give 2 or more")
        if data != "embedded" or palette.appearance is None:
            raise ValueError(
                f"samples are segmented by their colours, which only the embedded set's classes have, not {data} in "
                f"the palette {palette.name}; segment these by a network of yours, and compare with "
                "lfm_fast.metrics.segmentation.compare."
            )
        images = MappedImages(open_images("embedded", flow.image_size, split="held_out"), palette)
        positions = torch.arange(min(num_images, len(images))) * len(images) // min(num_images, len(images))
        maps, truths = images.label_maps(positions), images.batch(positions)
        samples = flow.sample(len(maps), condition=maps, seed=seed, **sampling)
        inputs = (truths.float() / 127.5 - 1).to(flow.device)
        with torch.no_grad():
            rebuilt = torch.cat([flow.decode(flow.autoencoder.encode(part).mean) for part in inputs.split(64)])
        figures = {}
        for name, pictures, expected in (
            ("", samples, maps),
            (" with other maps", samples, maps.roll(len(maps) // 2, 0)),  # not the next one, which is often alike
            (" of the autoencoder", rebuilt, maps),
        ):
            scores = map_agreement(pictures, expected, palette)
            figures[f"mean IoU{name}"], figures[f"pixel accuracy{name}"] = scores.mean_iou, scores.accuracy
        return figures


class MappedLatents(ConditionedSource):
    """Training's latents and labels, and the label map of each sample, (B, H, W) int64, mirrored where its image is."""

    def __init__(self, source, images: MappedImages):
        super().__init__(source, images)
        self.palette = images.palette

    def _read(self, sample_numbers, seed):
        maps = self._images.label_maps(item_of(sample_numbers, self.num_items, seed))
        flips = self._flips(sample_numbers, seed)
        return torch.where(flips[:, None, None], self.palette.mirror(maps), maps)


def from_semantic_map(flow, label_map, num_samples=1, seed=0, *, palette=None, holds="auto", **sampling):
    """Pictures for a label map: (num_samples, 3, H, W) float32 in [0, 1] on the CPU, or as many for each of N maps.

    Args:
        flow: a `LatentFlow` trained with task "semantic".
        label_map: a file, a PIL image, or an array: ids (H, W) or (N, H, W), or colours (H, W, 3) uint8. A map of
            another size than the flow's images is cut to its middle square and scaled by the nearest pixel.
        num_samples: pictures for each map; those of map k are numbers k num_samples, k num_samples + 1, ...
        seed: of the noise.
        palette: of the map, a name or a `Palette`; None takes the one that the flow was trained with.
        holds: what a file or a PIL image holds: "ids", "colours", or "auto", colours where it is RGB.
        sampling: arguments of `LatentFlow.sample`.

    Raises:
        ValueError: the flow is not conditioned on label maps, or the map has ids or colours that are not its palette's.
    """
    palette = _palette_of(flow, palette)
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}; it must be an integer from 1 on.")
    if sampling.get("condition") is not None:
        raise ValueError("the condition is made of the label map; give label_map and no condition.")
    maps = label_maps.as_label_maps(label_map, palette, holds)
    maps = torch.stack([label_maps.centre_square(each, flow.image_size) for each in maps])
    maps = maps.repeat_interleave(num_samples, 0)
    return flow.sample(len(maps), condition=maps, seed=seed, **sampling)


def _palette(config):
    """The palette that the settings name, or the data's own. Raises ValueError where none is given."""
    own = "embedded" if config.data == "embedded" else None
    if config.palette is None and own is None and config.data is not None:
        own = palette_of(config.data, config.layout or "auto")
    if config.palette is None and own is None:
        raise ValueError("label maps need a palette, which says what their ids are; give --palette.")
    return get_palette(config.palette or own)


def _palette_of(flow, palette=None):
    """The palette of a flow that is conditioned on label maps. Raises ValueError for another flow or palette."""
    encoder = getattr(flow.model, "encoder", None)
    if not isinstance(encoder, LabelMapEncoder):
        raise ValueError(
            f"this flow was trained for {flow.task.get('name', 'no task')} and takes no label map; "
            "train one with --task semantic."
        )
    if palette is None and "palette" not in flow.task:
        raise ValueError("this flow does not say which palette it was trained with; give palette.")
    palette = get_palette(flow.task["palette"] if palette is None else palette)
    if len(palette) != encoder.num_classes:
        raise ValueError(
            f"this flow knows {encoder.num_classes} ids, but the palette {palette.name} has {len(palette)}."
        )
    return palette
