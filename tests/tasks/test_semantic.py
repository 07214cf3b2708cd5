import runpy
import types
from pathlib import Path

import pytest
import torch
from PIL import Image

from lfm_fast.cli import main
from lfm_fast.data import embedded, label_maps
from lfm_fast.data.mapped_images import MappedImages
from lfm_fast.data.palettes import get_palette
from lfm_fast.data.source import ImageSource
from lfm_fast.distributed import World
from lfm_fast.metrics.segmentation import map_agreement
from lfm_fast.models import NETWORKS, DiT
from lfm_fast.pipeline import LatentFlow
from lfm_fast.tasks import task_named
from lfm_fast.tasks.semantic import MappedLatents, Semantic
from lfm_fast.train.config import from_preset
from lfm_fast.train.loop import build_state, training_path
from lfm_fast.train.step import train_step

COLOURS = (0, 5, 9)  # background, red and yellow of the embedded palette


class Patches(ImageSource):
    """64 pictures of 16 pixels, each four by four squares of three colours, and how an embedded source gives them."""

    name, flip = "embedded", True

    def __init__(self):
        super().__init__(16, [0] * 64, ["all"], [str(i) for i in range(64)])
        choice = torch.randint(3, (64, 4, 4), generator=torch.Generator().manual_seed(0))
        self.ids = torch.tensor(COLOURS)[choice].repeat_interleave(4, 1).repeat_interleave(4, 2)

    def rgba(self, position):
        ids = self.ids[position]
        colour = torch.tensor(get_palette("embedded").appearance, dtype=torch.uint8)[ids].permute(2, 0, 1)
        return torch.cat([colour, torch.where(ids == 0, 0, 255).to(torch.uint8)[None]])

    def load(self, position):
        return embedded.on_white(self.rgba(position))


class Pixels:
    """An autoencoder of every second pixel; its fourth channel is nothing."""

    name, downsampling, latent_channels, network = "pixels", 2, 4, torch.nn.Identity()

    def encode(self, images):
        latents = torch.cat([images, torch.zeros_like(images[:, :1])], 1)[..., ::2, ::2]
        return types.SimpleNamespace(mean=latents)

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3).clamp(-1, 1)

    def to(self, device):
        return self


class PixelLatents:
    """What `Patches` are through `Pixels`, by sample number and not in the order of an epoch."""

    num_items, latent_shape, class_names, num_classes, flip = 64, (4, 8, 8), ["all"], 1, True

    def __init__(self, images):
        from lfm_fast.data.latents import flips_of
        from lfm_fast.data.order import item_of

        self.labels, self._images, self._item_of, self._flips_of = images.labels, images, item_of, flips_of

    def batch(self, sample_numbers, seed):
        images = self._images.batch(self._item_of(sample_numbers, 64, seed))
        flips = self._flips_of(sample_numbers, seed)
        images[flips] = images[flips].flip(-1)
        return Pixels().encode(images.float() / 127.5 - 1).mean, torch.zeros(len(images), dtype=torch.int64)


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS, "DiT-Tiny", (DiT, {"hidden_size": 64, "depth": 2, "num_heads": 2, "patch_size": 2}))
        yield


def settings(**changes):
    fixed = {"data": "embedded", "autoencoder": "embedded", "model": "DiT-Tiny", "image_size": 16, "task": "semantic"}
    return from_preset(
        **{**fixed, "num_classes": 0, "label_dropout": 0.0, "batch_size": 32, "learning_rate": 3e-3, **changes}
    )


def source():
    images = Patches()
    return MappedLatents(PixelLatents(images), MappedImages(images, "embedded"))


def flow_of(model, task=None):
    sampling = {"method": "heun", "num_steps": 10}
    return LatentFlow(
        model.eval(), Pixels(), sampling=sampling, task=task or {"name": "semantic", "palette": "embedded"}
    )


@pytest.fixture(scope="module")
def trained():
    """A flow after 80 steps on squares of three colours: some seconds."""
    config = settings(precision="fp32", seed=1, ema_decay=0.98)
    state, data, path = build_state(config, source(), World()), source(), training_path(config)
    for _ in range(80):
        train_step(state, data, config, path, World())
    return flow_of(state.ema.average)


def test_a_condition_is_a_function_of_seed_and_number():
    data, numbers = source(), torch.arange(40, 140)
    maps = data.condition(numbers, 7)
    assert maps.dtype == torch.int64
    assert torch.equal(torch.cat([data.condition(part, 7) for part in numbers.split(9)]), maps)
    assert torch.equal(data.condition(numbers.flip(0), 7), maps.flip(0))
    assert not torch.equal(data.condition(numbers, 8), maps)


def test_the_condition_is_of_the_very_image_mirrored_or_not():
    data, numbers = source(), torch.arange(128)
    maps, pictures = data.condition(numbers, 3), data.pictures(numbers, 3)
    assert map_agreement(pictures, maps).accuracy == 1.0
    decoded = (Pixels().decode(data.batch(numbers, 3)[0]) + 1) / 2
    assert map_agreement(decoded, maps).accuracy == 1.0
    assert map_agreement(decoded, maps.flip(-1)).accuracy < 0.9


def test_what_is_shown_is_the_map_and_its_image():
    data, numbers = source(), torch.arange(6)
    inputs, truths = Semantic().shown(data, numbers, 0)
    assert inputs.shape == truths.shape == (6, 3, 16, 16)
    maps = data.condition(numbers, 0)
    assert torch.equal(inputs, label_maps.draw(maps, "embedded").float() / 255)
    assert map_agreement(truths, maps).accuracy == 1.0


def test_samples_of_a_trained_flow_follow_their_maps(trained):
    """On maps that it never saw: 16 squares of three colours have 43 million."""
    choice = torch.randint(3, (24, 4, 4), generator=torch.Generator().manual_seed(99))
    maps = torch.tensor(COLOURS)[choice].repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = trained.from_semantic_map(maps, seed=5)
    # chance is 1 / 3 of the pixels, which other maps give; 0.88 after 60 steps and 0.92 after 120
    assert map_agreement(images, maps).accuracy > 0.8
    assert map_agreement(images, maps.roll(1, 0)).accuracy < 0.45


def test_pictures_depend_on_map_and_number_alone(trained):
    first, second = Patches().ids[:2]
    both = trained.from_semantic_map(torch.stack([first, second]), num_samples=2, seed=3)
    assert both.shape == (4, 3, 16, 16)
    # matrix products of other sizes sum in another order
    torch.testing.assert_close(trained.from_semantic_map(first, 2, 3), both[:2], atol=1e-4, rtol=0)
    alone = trained.from_semantic_map(second, 1, 3, indices=[3])
    torch.testing.assert_close(alone, both[3:], atol=1e-4, rtol=0)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


def test_a_map_in_any_form_and_size(trained, tmp_path):
    ids = Patches().ids[0]
    expected = trained.from_semantic_map(ids)
    label_maps.write_label_map(tmp_path / "map.png", ids, "embedded")
    large = label_maps.resize(ids, 48, 48)
    wide = torch.cat([torch.zeros(16, 5, dtype=torch.int64), ids, torch.zeros(16, 5, dtype=torch.int64)], 1)
    colours = label_maps.draw(ids, "embedded").permute(1, 2, 0).numpy()
    for given in (tmp_path / "map.png", str(tmp_path / "map.png"), large, wide, colours, Image.fromarray(colours)):
        assert torch.equal(trained.from_semantic_map(given), expected)


def test_bad_input_is_refused(trained):
    ids = Patches().ids[0]
    for arguments, says in (
        (
            {"label_map": ids + 20},
            r"label_map has the id 2\d at row \d+, column \d+, but the ids of embedded are 0 to 22",
        ),
        ({"label_map": ids, "num_samples": 0}, "num_samples is 0"),
        ({"label_map": ids, "palette": "ade20k"}, "this flow knows 23 ids, but the palette ade20k has 151"),
        ({"label_map": ids, "palette": "grey"}, "palette is 'grey'; there is embedded"),
        ({"label_map": "nowhere.png"}, r"The label map nowhere\.png cannot be used: it cannot be opened"),
        ({"label_map": ids, "condition": ids}, "give label_map and no condition"),
    ):
        with pytest.raises(ValueError, match=says):
            trained.from_semantic_map(**arguments)
    with pytest.raises(ValueError, match="does not say which palette"):
        flow_of(trained.model, {"name": "semantic"}).from_semantic_map(ids)
    with pytest.raises(ValueError, match="trained for no task and takes no label map"):
        LatentFlow.from_pretrained("embedded").from_semantic_map(ids)


def test_settings_that_cannot_work_are_refused():
    task = task_named("semantic")
    with pytest.raises(ValueError, match="label maps need a palette, which says what their ids are; give --palette"):
        task.network(settings(data="photos"), (4, 8, 8))
    with pytest.raises(ValueError, match="palette is 'ade20k', but the label maps of the embedded set"):
        task.images(settings(palette="ade20k"))
    assert task.settings(settings(data="photos", palette="coco-stuff")) == {"palette": "coco-stuff"}
    assert task.example(settings(), 3, (4, 8, 8)).shape == (3, 16, 16)


def test_one_map_alone_is_not_evaluated(trained):
    """There would be no other map to hold it against."""
    with pytest.raises(ValueError, match="num_images is 1; give 2 or more"):
        task_named("semantic").evaluate(trained, num_images=1, seed=0, data="embedded")


def test_the_encoder_is_trained_unless_asked_otherwise():
    task = task_named("semantic")
    ours, theirs = (task.network(settings(compat=compat), (4, 8, 8)) for compat in (None, "lfm"))
    assert ours.encoder.weight.requires_grad
    assert not list(theirs.encoder.parameters())
    assert (ours.network.in_channels, ours.network.out_channels) == (8, 4)
    assert ours.encoder.config["downsampling"] == 2


def test_evaluation_tells_a_flow_that_follows_its_maps_from_one_that_does_not():
    """A flow that knows every held-out picture by its map does as well as the pictures; a constant one does not."""
    images = embedded.EmbeddedImages(16, split="held_out")
    maps = MappedImages(images, "embedded").label_maps(range(len(images)))
    encoder = types.SimpleNamespace(encode=Pixels().encode)

    def perfect(count, condition, **_):
        match = (condition[:, None] == maps).flatten(2).all(2).int().argmax(1)
        return images.batch(match.tolist()).float() / 255

    def constant(count, condition, **_):
        return torch.ones(count, 3, 16, 16)

    found = []
    for sample in (perfect, constant):
        model = Semantic().network(settings(), (4, 8, 8))
        flow = types.SimpleNamespace(
            model=model, task={"palette": "embedded"}, image_size=16, sample=sample, autoencoder=encoder,
            device="cpu", decode=lambda z: (Pixels().decode(z) + 1) / 2,
        )  # fmt: skip
        found.append(Semantic().evaluate(flow, num_images=50, seed=0, data="embedded"))
    good, bad = found
    assert good["mean IoU"] > 0.7  # colours at edges mix, and at 16 pixels most are edges
    assert good["mean IoU with other maps"] < 0.15
    assert bad["mean IoU"] < 0.15
    assert good["mean IoU of the autoencoder"] == bad["mean IoU of the autoencoder"] > 0.15
    with pytest.raises(ValueError, match="not photos in the palette embedded; segment these by a network of yours"):
        Semantic().evaluate(flow, num_images=5, seed=0, data="photos")
    flow.model, flow.task = Semantic().network(settings(data="x", palette="ade20k"), (4, 8, 8)), {"palette": "ade20k"}
    with pytest.raises(ValueError, match="not embedded in the palette ade20k"):
        Semantic().evaluate(flow, num_images=5, seed=0, data="embedded")


def test_from_training_to_pictures_by_commands(tmp_path, capsys):
    """A run of two steps leaves a checkpoint that knows its task, draws pictures for a map, and can be evaluated."""
    from lfm_fast.train.loop import train

    config = settings(
        image_size=64, batch_size=4, steps=2, max_items=8, output=str(tmp_path), sample_every=2, samples_per_class=2,
        device="cpu", compile="off", precision="fp32",
    )  # fmt: skip
    folder = train(config)
    assert Image.open(folder / "samples" / "0000002.png").size == (4 * 66 + 2, 6 * 66 + 2)
    flow = LatentFlow.from_pretrained(folder)
    assert flow.task == {"name": "semantic", "palette": "embedded"}
    label_maps.write_label_map(tmp_path / "map.png", torch.full((64, 64), 9), "embedded")
    few = ["--method", "euler", "--num-steps", "1", "--device", "cpu"]
    sample = ["sample", "--model", str(folder), "--label-map", str(tmp_path / "map.png"), "--num-images", "2", *few]
    assert not main([*sample, "--output", str(tmp_path / "out.png")])
    assert Image.open(tmp_path / "out.png").size == (2 * 66 + 2, 66 + 2)
    assert not main(["evaluate", "--model", str(folder), "--num-images", "2", *few])
    assert "mean IoU of the autoencoder: " in capsys.readouterr().out
    show_task = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "show_task.py"))
    show_task["show"](folder, tmp_path / "grid.png", rows=2, samples=3, nearest=True, num_steps=1)
    assert Image.open(tmp_path / "grid.png").width == 6 * 130 + 2
