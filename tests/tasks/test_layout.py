"""Layouts from the data to pictures: what training is given, what sampling takes, and what is refused."""

import json
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import lfm_fast
from lfm_fast.autoencoder import load_autoencoder
from lfm_fast.cli import main
from lfm_fast.data.boxes import as_boxes, mirrored
from lfm_fast.data.latents import CachedLatents, flips_of
from lfm_fast.data.layouts import EmbeddedLayouts
from lfm_fast.data.order import item_of
from lfm_fast.metrics.layout import layout_agreement
from lfm_fast.models import create_model
from lfm_fast.models.box_encoder import BoxEncoder
from lfm_fast.models.conditioned import Conditioned
from lfm_fast.tasks import task_named
from lfm_fast.tasks.layout import WITHHELD, WithLayouts, from_layout
from lfm_fast.train.config import from_preset
from lfm_fast.train.loop import train

SIZE = 32
SETTINGS = {"method": "heun", "num_steps": 2}
UNET = {"model_channels": 32, "channel_mult": (1,), "num_res_blocks": 1, "attention_sides": (8,), "context_dim": 16}
NAMES = ["cat", "dog", "bird"]
CAT = {"class": "cat", "box": [0.1, 0.2, 0.5, 0.9]}
DOG = {"class": 1, "box": [0.5, 0, 1, 0.25]}


@pytest.fixture(scope="module")
def scenes():
    return EmbeddedLayouts(SIZE, num_scenes=24)


def random_weights(module, std):
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)  # zeros, as fresh ones end in, would be blind to any condition
    return module.eval()


@pytest.fixture(scope="module")
def network():
    return random_weights(create_model("adm-layout", image_size=32, downsampling=4, **UNET), 0.15)


@pytest.fixture(scope="module", params=["tokens alone", "tokens and planes"])
def flow(network, request):
    sizes = {"num_classes": 3, "max_boxes": 4, "context_dim": 16}
    if request.param == "tokens and planes":
        sizes |= {"planes": 3, "side": 8}
        options = {**UNET, "in_channels": 7, "out_channels": 4}
        network = random_weights(create_model("adm-layout", image_size=32, downsampling=4, **options), 0.15)
    model = Conditioned(network=network, encoder=random_weights(BoxEncoder(**sizes), 0.5))
    task = {"name": "layout", "box_classes": NAMES}
    return lfm_fast.LatentFlow(model, load_autoencoder("embedded"), task=task)


class Latents:
    """What training reads beside the layouts; only its size and its mirroring are looked at."""

    latent_shape, class_names, num_classes, labels = (4, 8, 8), [], 0, torch.zeros(24)

    def __init__(self, flip):
        self.num_items, self.flip = 24, flip


@pytest.mark.parametrize("flip", [False, True])
def test_each_sample_has_the_boxes_of_its_picture(scenes, flip):
    source = WithLayouts(Latents(flip), scenes)
    numbers = torch.arange(48)
    boxes, images = source.condition(numbers, seed=5), source.pictures(numbers, seed=5).float() / 255
    given = boxes[..., 0].amax(dim=1) >= 0
    agreement = layout_agreement(images[given], boxes[given])
    assert agreement.inside > 0.97  # the median of a crowded scene is not always its canvas
    assert agreement.filled > 0.5
    items = item_of(numbers, 24, 5)
    expected = scenes.boxes[items]
    if flip:
        mirrors = flips_of(numbers, 5)
        assert 0.2 < mirrors.double().mean() < 0.8
        expected[mirrors] = mirrored(expected[mirrors])
    assert torch.equal(boxes[given], expected[given])


def test_the_latents_are_those_of_the_same_pictures(scenes):
    """Held to the autoencoder itself: the layouts beside latents of the wrong items would train without a sound."""
    autoencoder = load_autoencoder("embedded")
    latents = CachedLatents.from_images(scenes, autoencoder)
    source = WithLayouts(latents, scenes)
    numbers = torch.tensor([3, 17, 30])
    z_0, _ = source.batch(numbers, seed=1)
    decoded = (autoencoder.decode(z_0) + 1) / 2
    pictures = source.pictures(numbers, seed=1).float() / 255
    errors = (decoded[:, None] - pictures[None]).square().mean(dim=(2, 3, 4))
    assert torch.equal(errors.argmin(dim=1), torch.arange(3))
    assert errors.diagonal().max() < 0.3 * (errors + torch.eye(3)).min()


def test_what_is_shown_are_the_frames_and_the_pictures(scenes):
    source, numbers = WithLayouts(Latents(True), scenes), torch.arange(12)
    inputs, truths = task_named("layout").shown(source, numbers, seed=5)
    assert inputs.shape == truths.shape == (12, 3, SIZE, SIZE)
    assert torch.equal(truths, source.pictures(numbers, 5).float() / 255)
    for drawn, boxes in zip(inputs, source.condition(numbers, 5)):
        coloured = (drawn.amax(dim=0) - drawn.amin(dim=0) > 0.05) | (drawn.amax(dim=0) < 0.9)
        covered = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        for label, *corners in boxes.tolist():
            x0, y0, x1, y1 = (round(SIZE * value) for value in corners)
            covered[y0:y1, x0:x1] |= label >= 0
        assert torch.equal(coloured, covered)


def test_a_condition_depends_on_seed_and_number_alone_and_one_in_ten_is_withheld(scenes):
    source = WithLayouts(Latents(True), scenes)
    numbers = torch.arange(4000)
    boxes = source.condition(numbers, seed=5)
    assert torch.equal(source.condition(numbers[[77, 3]], seed=5), boxes[[77, 3]])
    withheld = boxes[..., 0].amax(dim=1) < 0
    assert abs(withheld.double().mean() - WITHHELD) < 4 * (0.09 / 4000) ** 0.5  # 4 sigma
    others = source.condition(numbers, seed=6)[..., 0].amax(dim=1) < 0
    assert (withheld & others).double().mean() < 0.03  # independent: 0.01
    mirrors = flips_of(numbers, 5)
    assert abs(withheld[mirrors].double().mean() - withheld[~mirrors].double().mean()) < 0.04


def test_no_layout_of_a_held_out_scene_is_withheld():
    scenes = EmbeddedLayouts(SIZE, num_scenes=24, split="held_out")
    source = task_named("layout").source(None, Latents(False), scenes, None)
    assert (source.condition(torch.arange(400), seed=5)[..., 0].amax(dim=1) >= 0).all()


def test_from_layout_samples_each_layout_in_turn(flow):
    images = flow.from_layout([[CAT], [CAT, DOG]], num_samples=2, seed=3, **SETTINGS)
    assert images.shape == (4, 3, SIZE, SIZE)
    boxes = torch.stack([as_boxes([CAT], NAMES, 4)] * 2 + [as_boxes([CAT, DOG], NAMES, 4)] * 2)
    assert torch.equal(images, flow.sample(4, condition=boxes, seed=3, **SETTINGS))
    one = from_layout(flow, [CAT, DOG], num_samples=2, seed=3, indices=torch.tensor([2, 3]), **SETTINGS)
    torch.testing.assert_close(one, images[2:], rtol=0, atol=1e-5)  # products of other batches round otherwise
    assert (images[:2] - from_layout(flow, [DOG], 2, 3, **SETTINGS)).abs().max() > 0.01
    assert torch.equal(images[:2], from_layout(flow, boxes[0, :1], 2, 3, **SETTINGS))  # a row alone is filled up
    assert torch.equal(images[1:3], from_layout(flow, boxes[1:3], 1, 3, indices=torch.tensor([1, 2]), **SETTINGS))
    empty = from_layout(flow, [], 2, 3, **SETTINGS)
    assert torch.equal(empty, from_layout(flow, torch.full((4, 5), -1.0), 2, 3, **SETTINGS))


def test_the_order_of_boxes_makes_no_difference(flow):
    images = from_layout(flow, [[CAT, DOG], [DOG, CAT]], indices=torch.tensor([0, 0]), **SETTINGS)
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)  # sums over tokens in another order


@pytest.mark.parametrize("method", ["heun", "dopri5"])
def test_layout_scale_goes_on_from_no_layout_to_the_layout(flow, method):
    """Against the formula, in a model that blends by itself."""
    boxes = torch.stack([as_boxes([CAT], NAMES, 4), as_boxes([DOG, CAT], NAMES, 4)])
    empty = torch.full_like(boxes, -1)

    def blended(t, z):
        return 2.5 * flow.model(t, z, condition=boxes[: len(z)]) - 1.5 * flow.model(t, z, condition=empty[: len(z)])

    sampling = {"method": method, "num_steps": 4} if method == "heun" else {"method": method, "rtol": 1e-6}
    images = from_layout(flow, boxes, seed=2, layout_scale=2.5, **sampling)
    z_0 = lfm_fast.sample(blended, lfm_fast.noise(2, flow.latent_shape, seed=2), **{**sampling, "rtol": 1e-6})
    torch.testing.assert_close(images, flow.decode(z_0), rtol=0, atol=2e-3 if method == "dopri5" else 1e-5)
    assert (images - from_layout(flow, boxes, seed=2, **sampling)).abs().max() > 0.02


def test_tokens_of_any_encoder_are_a_context(network):
    """An encoder of one's own: a table of words, four tokens of one image, three of the other filled with zeros."""
    torch.manual_seed(1)
    words = nn.Embedding(10, 16)
    tokens = words(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]])).detach()
    z_1 = lfm_fast.noise(2, (4, 8, 8), seed=4)
    z_0 = lfm_fast.sample(network, z_1, model_kwargs={"context": tokens}, **SETTINGS)
    alone = lfm_fast.sample(network, z_1[1:], model_kwargs={"context": tokens[1:]}, **SETTINGS)
    torch.testing.assert_close(alone, z_0[1:], rtol=0, atol=1e-5)
    assert (
        lfm_fast.sample(network, z_1, model_kwargs={"context": tokens.flip(0)}, **SETTINGS) - z_0
    ).abs().max() > 0.01
    flow = lfm_fast.LatentFlow(network, load_autoencoder("embedded"))
    torch.testing.assert_close(flow.sample(2, condition=tokens, seed=4, **SETTINGS), flow.decode(z_0))
    for wrong in (tokens[..., :8], tokens[:, 0], tokens.long()):
        with pytest.raises(ValueError, match=r"context must be floating and \(B, L, 16\)") as error:
            lfm_fast.sample(network, z_1, model_kwargs={"context": wrong}, **SETTINGS)
        assert str(error.value).count(". ") == 0
    with pytest.raises(ValueError, match="this network needs a context"):
        lfm_fast.sample(network, z_1, **SETTINGS)


@pytest.mark.parametrize(
    ("boxes", "options", "words"),
    [
        ([{"class": "fish", "box": [0, 0, 1, 1]}], {}, "box class 'fish' is not known: choose one of cat, dog, bird"),
        ([{"class": 3, "box": [0, 0, 1, 1]}], {}, "box class 3 is not known"),
        ([{"class": "cat", "box": [0, 0, 1.2, 1]}], {}, "leaves the image"),
        ([{"class": "cat", "box": [0.6, 0, 0.4, 1]}], {}, "has no area"),
        ([CAT] * 5, {}, "has 5 boxes, but the network was made for 4 at most"),
        (torch.zeros(1, 2, 4), {}, r"boxes are \(2, 4\)"),
        (torch.zeros(0, 4, 5), {}, "there is no layout"),
        (torch.zeros(5), {}, r"a layout is \(5,\)"),
        ("cat", {}, "a layout is a str"),
        ([CAT], {"num_samples": 0}, "num_samples is 0"),
        ([CAT], {"layout_scale": 2.0, "guidance_scale": 3.0}, "layout_scale guides by the layout"),
        ([CAT], {"layout_scale": "x"}, "scale"),
        ([CAT], {"y": 1}, "without labels"),
        (CAT, {}, "a layout is a dict"),
        (3, {}, "a layout is a int"),
        ({1}, {}, "a layout is a set"),
        (np.array([["cat"]]), {}, "boxes holds <U3; expected numbers"),
        ([{"class": 10**400, "box": [0, 0, 1, 1]}], {}, "box class 10+ is not known"),
        ([{"class": "cat", "box": [0, 0, 10**400, 1]}], {}, "expected four numbers"),
        ([CAT], {"condition": torch.zeros(1, 4, 5)}, "give boxes and no condition"),
    ],
)
def test_bad_input_gets_one_sentence(flow, boxes, options, words):
    with pytest.raises(ValueError, match=words) as error:
        from_layout(flow, boxes, **{**SETTINGS, **options})
    assert str(error.value).count(". ") == 0


def test_layouts_of_numpy_are_layouts(flow):
    expected = from_layout(flow, [CAT, DOG], **SETTINGS)
    rows = np.array([[0, *CAT["box"]], [1, *DOG["box"]]])
    numbers = [{"class": np.int64(k), "box": np.float32(box["box"])} for k, box in ((0, CAT), (1, DOG))]
    mixed = [{"class": "cat", "box": [np.float32(value) for value in CAT["box"]]}, DOG]
    for given in (rows, rows.astype(np.float32)[None], [rows], numbers, mixed, [(CAT, DOG)]):
        torch.testing.assert_close(from_layout(flow, given, **SETTINGS), expected)


def test_a_layout_scale_for_each_picture(flow):
    each = from_layout(flow, [CAT], num_samples=3, layout_scale=torch.tensor([1.0, 2.0, 3.0]), batch_size=2, **SETTINGS)
    for number, scale in enumerate((1.0, 2.0, 3.0)):
        alone = from_layout(flow, [CAT], num_samples=3, layout_scale=scale, **SETTINGS)[number]
        torch.testing.assert_close(each[number], alone, atol=1e-5, rtol=0)


def test_a_flow_of_another_task_is_refused(network):
    flow = lfm_fast.LatentFlow(network, load_autoencoder("embedded"))
    with pytest.raises(ValueError, match="was not trained on layouts"):
        from_layout(flow, [CAT])


def _config(**settings):
    small = {"task": "layout", "model": "ADM-Emoji-layout", "image_size": SIZE, "batch_size": 4, "steps": 4}
    small |= {"sample_every": 0, "warmup_steps": 0, "max_items": 6, "device": "cpu", "resume": "never"}
    small |= {"label_dropout": 0.0, "guidance_scale": 1.0}
    return from_preset("embedded", **{**small, **settings})


def test_a_run_leaves_a_flow_that_knows_its_classes(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("lfm_fast.data.layouts", fromlist=["x"]).NUM_SCENES, "train", 6)
    folder = train(_config(output=str(tmp_path)))
    flow = lfm_fast.LatentFlow.from_pretrained(folder)
    assert flow.task == {"name": "layout", "box_classes": EmbeddedLayouts(SIZE, num_scenes=1).box_classes}
    torch.manual_seed(0)
    fresh = task_named("layout").network(_config(), (4, 8, 8))
    moved = [not torch.equal(a, b) for a, b in zip(flow.model.encoder.parameters(), fresh.encoder.parameters())]
    assert all(moved)  # trained with the network
    flow.save_pretrained(tmp_path / "saved")
    again = lfm_fast.LatentFlow.from_pretrained(tmp_path / "saved")
    flags = [{"class": "Flags", "box": [0, 0, 0.5, 0.5]}]
    once = {"method": "euler", "num_steps": 1}
    assert torch.equal(again.from_layout(flags, **once), flow.from_layout(flags, **once))
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps(flags))
    common = ["--model", str(folder), "--method", "euler", "--num-steps", "1"]
    assert main(["sample", *common, "--layout", str(layout), "--num-images", "2", "--output", str(tmp_path / "s")]) == 0
    assert len(list((tmp_path / "s").glob("*.png"))) == 2
    figures = tmp_path / "figures.json"
    monkeypatch.setattr("lfm_fast.tasks.layout._EXAMPLES", 30)
    assert main(["evaluate", *common, "--num-images", "5", "--output", str(figures)]) == 0
    found = json.loads(figures.read_text())
    kinds = ("", " with other layouts", " without layout", " of the autoencoder")
    assert list(found) == [what + kind for kind in kinds for what in ("inside", "filled", "classes")]
    assert found["inside of the autoencoder"] > 0.9 > found["inside"]  # four steps have taught it nothing
    layout.write_text(json.dumps([{"class": "Fish", "box": [0, 0, 0.5, 0.5]}]))
    assert main(["sample", *common, "--layout", str(layout), "--output", str(tmp_path / "t.png")]) == 2
    assert "box class 'Fish' is not known" in capsys.readouterr().err


def test_a_folder_of_layouts_makes_the_network(tmp_path):
    for number, layout in enumerate([[CAT], [CAT, {**CAT, "class": "ant"}, CAT]]):
        (tmp_path / f"{number}.json").write_text(json.dumps(layout))
        Image.new("RGB", (48, 36), "white").save(tmp_path / f"{number}.png")
    config = types.SimpleNamespace(**{**_config().as_dict(), "data": str(tmp_path), "conditions": str(tmp_path)})
    images = task_named("layout").images(config)
    assert images.boxes.shape == (2, 3, 5)
    source = task_named("layout").source(config, Latents(False), images, None)
    assert source.box_classes == ["ant", "cat"]
    encoder = task_named("layout").network(config, (4, 8, 8)).encoder
    assert (encoder.num_classes, encoder.max_boxes) == (2, 3)
    assert task_named("layout").settings(config) == {"box_classes": ["ant", "cat"]}
    assert task_named("layout").example(config, 5, (4, 8, 8)).shape == (5, 3, 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"model": "DiT-Emoji/4"},
            "DiT-Emoji/4 attends to no context; for task layout give a network such as adm-layout",
        ),
        ({"data": "photos"}, "task layout needs --conditions FOLDER"),
    ],
)
def test_settings_that_cannot_work_get_a_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        task_named("layout").network(_config(**settings), (4, 8, 8))


def test_what_cannot_be_measured_is_refused(flow):
    task = task_named("layout")
    with pytest.raises(ValueError, match="only the embedded scenes have"):
        task.evaluate(flow, num_images=2, seed=0, data="photos")
    with pytest.raises(ValueError, match="num_images is 1; give 2 or more"):
        task.evaluate(flow, num_images=1, seed=0, data="embedded")
    with pytest.raises(ValueError, match="this flow has the box classes cat, dog, bird, but the embedded scenes those"):
        task.evaluate(flow, num_images=2, seed=0, data="embedded")


def test_settings_that_cannot_work_are_refused_before_anything_is_encoded():
    task = task_named("layout")
    with pytest.raises(ValueError, match="DiT-Emoji/4 attends to no context"):
        task.images(_config(model="DiT-Emoji/4"))
    with pytest.raises(ValueError, match="the embedded scenes have layouts of their own; leave --conditions out"):
        task.images(_config(conditions="layouts"))
