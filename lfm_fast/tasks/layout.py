"""Layout to image: pictures whose things are in the boxes that were asked for."""

import numpy as np
import torch
from torch import Tensor, nn

from lfm_fast import ops
from lfm_fast.data.boxes import as_boxes, draw_boxes, folder_boxes, folder_classes, mirrored, read_layouts
from lfm_fast.data.embedded import CATEGORIES
from lfm_fast.data.layouts import MAX_BOXES, EmbeddedLayouts
from lfm_fast.data.order import item_of
from lfm_fast.data.reading import to_tensor
from lfm_fast.data.source import ImageSource
from lfm_fast.guidance import Autoguidance
from lfm_fast.metrics.layout import ClassExamples, layout_agreement
from lfm_fast.models import create_model
from lfm_fast.models.box_encoder import NO_BOX, BoxEncoder
from lfm_fast.models.conditioned import Conditioned
from lfm_fast.ops.streams import STREAM_AUGMENTATION
from lfm_fast.tasks.base import ConditionedSource, Task

EMBEDDED = ("embedded", EmbeddedLayouts.name)
PLANES = 8  # of a coarse picture of the layout, put behind the latent's channels
WITHHELD = 0.1  # share of training's samples whose layout is withheld, so that there is a velocity to guide away from
_DRAW = 1  # block of the sample's augmentation stream that decides it; block 0 mirrors
_EXAMPLES = 1500  # scenes of training whose boxes show what the classes look like


class Layout(Task):
    """The condition is boxes with classes, (B, N, 5) float32; a trained encoder makes tokens of them to attend to."""

    def images(self, config, split: str = "train") -> ImageSource:
        """Scenes of the embedded set, or a folder's images with the layouts of the folder `conditions`."""
        _require_context(config.model)  # before the images are encoded, which can take long
        if config.data in EMBEDDED:
            if config.conditions is not None:
                raise ValueError("the embedded scenes have layouts of their own; leave --conditions out.")
            return EmbeddedLayouts(config.image_size, split=split, flip=config.flip)
        images = super().images(config, split)
        images.boxes, images.box_classes = folder_boxes(images, _folder(config))
        return images

    def source(self, config, source, images, autoencoder):
        """`source` with condition(sample_numbers, seed) -> (B, N, 5) float32; one layout in ten is withheld, of
        held-out scenes none."""
        return WithLayouts(source, images, WITHHELD if getattr(images, "split", "train") != "held_out" else 0.0)

    def network(self, config, latent_shape) -> nn.Module:
        """The network of the settings, which attends to a context, behind an encoder of boxes."""
        _require_context(config.model)
        class_names, max_boxes = _classes(config)
        network = create_model(
            config.model,
            image_size=latent_shape[1],
            downsampling=1,
            in_channels=latent_shape[0] + PLANES,
            out_channels=latent_shape[0],
            num_classes=config.num_classes or 0,
            label_dropout=config.label_dropout,
        )
        width = network.config["context_dim"]
        sizes = {"max_boxes": max_boxes, "context_dim": width, "planes": PLANES, "side": latent_shape[1]}
        encoder = BoxEncoder(num_classes=len(class_names), **sizes)
        return Conditioned(network=network, encoder=encoder)

    def example(self, config, count: int, latent_shape) -> Tensor:
        """Layouts without a box."""
        return torch.full((count, _classes(config)[1], 5), float(NO_BOX))

    def settings(self, config) -> dict:
        """Names of the boxes' classes."""
        return {"box_classes": _classes(config)[0]}

    def shown(self, source, sample_numbers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """Frames in the colours of their classes, and the images they belong to."""
        truths = source.pictures(sample_numbers, seed).float() / 255
        layouts = source.condition(sample_numbers, seed)
        drawn = [np.array(draw_boxes(boxes, source.box_classes, truths.shape[-1])) for boxes in layouts]
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255, truths

    def generated(self, flow, args, **sampling) -> Tensor:
        """Images for each layout of the file `args.layout`."""
        sampling["num_samples"] = sampling.pop("num_images")
        return from_layout(flow, read_layouts(args.layout, class_names_of(flow)), **sampling)

    def evaluate(self, flow, *, num_images: int, seed: int, data: str, **sampling) -> dict[str, float]:
        """Shares of ink inside boxes, of boxes filled and of boxes with the right class (`metrics.layout`), of samples
        for held-out layouts.

        Beside them the same measured with other layouts than the samples were made for; of samples without a layout,
        as an unconditional flow would draw them; and of the autoencoder's reconstructions of the scenes themselves.
        """
        if data not in EMBEDDED:
            raise ValueError(
                f"data is {data!r}, but what is in a box is told by its difference from a plain canvas, which only the "
                "embedded scenes have; measure others with a detector of yours."
            )
        if num_images < 2:  # every layout is held against another one, too
            raise ValueError(f"num_images is {num_images}; give 2 or more")
        if class_names_of(flow) != list(CATEGORIES):
            raise ValueError(
                f"this flow has the box classes {', '.join(class_names_of(flow))}, but the embedded scenes those of "
                "emoji; evaluate it on images of its own by lfm_fast.metrics.layout."
            )
        scenes = EmbeddedLayouts(flow.image_size, split="held_out", num_scenes=num_images)
        training = EmbeddedLayouts(flow.image_size, num_scenes=_EXAMPLES)
        examples = ClassExamples.of(training.batch(range(_EXAMPLES)).float() / 255, training.boxes)
        boxes, truths = scenes.boxes, scenes.batch(range(num_images)).float() / 255
        posterior = flow.autoencoder.encode((2 * truths - 1).to(flow.device))
        samples = from_layout(flow, boxes, seed=seed, **sampling)
        figures = {}
        for name, shown, expected in (
            ("", samples, boxes),
            (" with other layouts", samples, boxes.roll(1, 0)),
            (" without layout", from_layout(flow, torch.full_like(boxes, NO_BOX), seed=seed, **sampling), boxes),
            (" of the autoencoder", flow.decode(posterior.mean), boxes),
        ):
            found = layout_agreement(shown, expected, examples)
            figures |= {f"{what}{name}": getattr(found, what) for what in ("inside", "filled", "classes")}
        return figures


class WithLayouts(ConditionedSource):
    """Training's latents and labels, and the boxes of each sample, (B, N, 5) float32, mirrored where its image is; of
    the share withheld, none."""

    def __init__(self, source, images, withheld: float = WITHHELD):
        super().__init__(source, images)
        self._withheld, self.boxes, self.box_classes = withheld, images.boxes, images.box_classes

    def _read(self, sample_numbers, seed):
        boxes = self.boxes[item_of(sample_numbers, self.num_items, seed)]
        boxes = torch.where(self._flips(sample_numbers, seed)[:, None, None], mirrored(boxes), boxes)
        draw = ops.philox_uniform(sample_numbers, 1, seed, STREAM_AUGMENTATION, _DRAW)[:, 0]
        return torch.where((draw < self._withheld)[:, None, None], torch.full_like(boxes, NO_BOX), boxes)


def from_layout(flow, boxes, num_samples=1, seed=0, *, layout_scale=1.0, indices=None, **sampling):
    """Pictures with things where they were asked for: (num_samples, 3, H, W) float32 in [0, 1] on the CPU.

        v = layout_scale v(z, layout) + (1 - layout_scale) v(z, no box)

    Args:
        flow: a `LatentFlow` trained with task layout.
        boxes: a list of {"class": name or number, "box": [x0, y0, x1, y1]}, coordinates in [0, 1], x to the right and
            y down, or an array or tensor (N, 5) of class and coordinates; of several layouts a list of such, or
            (B, N, 5) with class -1 where there is no box. Of several, all samples of the first come first.
        num_samples: pictures of each layout.
        seed: picture i depends on (seed, i, its layout) alone.
        layout_scale: guidance away from what is drawn without a layout; 1 is none and costs half as much. A number, or
            as guidance_scale of `lfm_fast.sample`.
        indices, sampling: as of `LatentFlow.sample`; a layout_scale other than 1 takes the place of other guidance.

    Raises ValueError, in one sentence: a flow of another task, boxes outside the picture or without area, unknown
    classes, more boxes than the network was made for, and what `LatentFlow.sample` refuses.

    Source: Rombach et al., arXiv 2112.10752, section 3.3; guidance as Ho and Salimans, arXiv 2207.12598, equation 6.
    """
    layouts = _layouts(flow, boxes)
    if sampling.get("condition") is not None:
        raise ValueError("the condition is made of the boxes; give boxes and no condition.")
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}; it must be an integer from 1 on")
    if isinstance(layout_scale, Tensor) or layout_scale != 1.0:
        if sampling.get("guidance") is not None or sampling.get("guidance_scale", 1.0) != 1.0:
            raise ValueError("layout_scale guides by the layout, guidance and guidance_scale by the label; give one")
        sampling["guidance"] = Autoguidance(_WithoutLayout(flow.model), layout_scale)
    condition = layouts.repeat_interleave(num_samples, dim=0)
    return flow.sample(len(condition), seed=seed, indices=indices, **{**sampling, "condition": condition})


def class_names_of(flow) -> list[str]:
    """Names of the classes of a flow's boxes, their numbers where it has none. Raises ValueError for another task's."""
    encoder = getattr(flow.model, "encoder", None)
    if getattr(encoder, "kind", None) != BoxEncoder.kind:
        raise ValueError("this flow was not trained on layouts; give one that was, as preset emoji-layout makes.")
    return flow.task.get("box_classes") or [str(number) for number in range(encoder.num_classes)]


def _layouts(flow, boxes) -> Tensor:
    """(B, max_boxes, 5) float32, checked."""
    class_names, limit = class_names_of(flow), flow.model.encoder.max_boxes
    boxes = _tensors(boxes)
    several = boxes.dim() == 3 if isinstance(boxes, Tensor) else _holds_layouts(boxes)
    layouts = [as_boxes(_tensors(layout), class_names, limit) for layout in (boxes if several else [boxes])]
    if not layouts:
        raise ValueError("there is no layout; give boxes of at least one.")
    return torch.stack(layouts)


def _tensors(boxes):
    return to_tensor(boxes, "boxes") if isinstance(boxes, np.ndarray) else boxes


def _holds_layouts(boxes) -> bool:
    return isinstance(boxes, (list, tuple)) and bool(boxes) and isinstance(boxes[0], (list, tuple, Tensor, np.ndarray))


class _WithoutLayout:
    """The network of a flow under no box at all, called as it is under a layout."""

    def __init__(self, model):
        self._network = model.network
        empty = torch.full((1, 1, 5), float(NO_BOX), device=next(model.parameters()).device)
        self._entries = model.parts(empty)[1]

    def __call__(self, t, z, y=None, **layout):
        entries = {name: entry.expand(len(z), *entry.shape[1:]) for name, entry in self._entries.items()}
        return self._network(t, z, y, **entries)


def _require_context(name):
    """Raise ValueError for the name of a network that attends to nothing."""
    with torch.device("meta"):  # without weights
        network = create_model(name, image_size=256)
    if "context" not in network.sample_arguments:
        raise ValueError(f"{name} attends to no context; for task layout give a network such as adm-layout.")


def _classes(config) -> tuple[list[str], int]:
    """Names of the boxes' classes, and boxes of a layout at most."""
    return (list(CATEGORIES), MAX_BOXES) if config.data in EMBEDDED else folder_classes(_folder(config))


def _folder(config) -> str:
    if config.conditions is None:
        raise ValueError("task layout needs --conditions FOLDER with a file IMAGE.json for each image of --data.")
    return config.conditions
