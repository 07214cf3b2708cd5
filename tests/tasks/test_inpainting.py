"""Inpainting: one condition in training and in use, pictures of any kind and size, and one sentence for misuse."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lfm_fast import LatentFlow
from lfm_fast.autoencoder import Autoencoder, SmallVAE
from lfm_fast.data.latents import CachedLatents, EncodedImages
from lfm_fast.data.source import ImageSource
from lfm_fast.guidance import LinearGuidance
from lfm_fast.models import DiT
from lfm_fast.pictures import to_uint8
from lfm_fast.tasks.inpainting import Inpainting, MaskedImages, condition_of, inpaint, paint
from lfm_fast.train.config import from_preset

SIDE = 16
SAMPLING = {"method": "euler", "num_steps": 3}


def tiny_flow(in_channels=4, num_classes=0):
    torch.manual_seed(0)
    model = DiT(
        image_size=SIDE // 2,
        in_channels=in_channels,
        out_channels=4,
        hidden_size=32,
        depth=2,
        num_heads=2,
        num_classes=num_classes,
        label_dropout=0.1 if num_classes else 0.0,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))  # fresh weights give velocity zero
    autoencoder = Autoencoder(SmallVAE(block_out_channels=(16, 32)), "tiny")
    names = tuple("abc"[:num_classes])
    return LatentFlow(model.eval(), autoencoder, class_names=names, sampling={**SAMPLING})


@pytest.fixture(scope="module")
def trained():
    return tiny_flow(in_channels=9)


@pytest.fixture(scope="module")
def any_flow():
    return tiny_flow(num_classes=3)


def picture_and_mask(height, width, seed=0):
    generator = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 3 :] = 255
    return generator.integers(0, 256, (height, width, 3), dtype=np.uint8), mask


APPROACHES = {"condition": "trained", "project": "any_flow", "project:resample": "any_flow"}


@pytest.fixture(params=APPROACHES)
def approach(request):
    return request.param, request.getfixturevalue(APPROACHES[request.param])


@pytest.mark.parametrize(
    ("fit", "size"), [("refuse", (16, 16)), ("resize", (37, 50)), ("tile", (37, 20)), ("tile", (9, 40))]
)
def test_what_is_known_stays_and_holes_are_painted(approach, fit, size):
    name, flow = approach
    picture, mask = picture_and_mask(*size)
    images = flow.inpaint(picture, mask, num_samples=3, fit=fit, approach=name)
    assert images.shape == (3, 3, *size)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    hole = mask > 0
    for image in to_uint8(images):
        assert np.array_equal(image[~hole], picture[~hole])
        assert not np.array_equal(image[hole], picture[hole])
    assert (images[0] - images[1])[:, hole].abs().max() > 0.01


def test_what_was_in_the_hole_makes_no_difference(approach):
    """The object to be removed leaves no trace, whatever the size of the picture."""
    name, flow = approach
    for fit, size in (("resize", (37, 50)), ("tile", (24, 24))):
        picture, mask = picture_and_mask(*size)
        other = np.where(mask[..., None] > 0, 255 - picture, picture)
        images = flow.inpaint(picture, mask, fit=fit, approach=name)
        assert torch.equal(images, flow.inpaint(other, mask, fit=fit, approach=name))


def test_what_is_known_makes_one(approach):
    name, flow = approach
    picture, mask = picture_and_mask(SIDE, SIDE)
    hole = torch.from_numpy(mask > 0)
    images, others = (flow.inpaint(p, mask, approach=name) for p in (picture, 255 - picture))
    assert (images - others)[..., hole].abs().max() > 0.01


def test_every_form_gives_the_same(approach):
    name, flow = approach
    picture, mask = picture_and_mask(SIDE, SIDE)
    images = flow.inpaint(picture, mask, approach=name)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)
    for other, hole in (
        (Image.fromarray(picture), Image.fromarray(mask)),
        (tensor, torch.from_numpy(mask > 0)),
        (tensor.float() / 255, torch.from_numpy(mask).float() / 255),
    ):
        assert torch.equal(flow.inpaint(other, hole, approach=name), images)
    assert torch.equal(flow.inpaint(picture, 255 - mask, hole=0, approach=name), images)


def test_a_sample_depends_on_seed_and_number_alone(approach):
    name, flow = approach
    picture, mask = picture_and_mask(24, 30)
    settings = {"fit": "tile", "approach": name, "seed": 4}
    together = flow.inpaint(picture, mask, num_samples=3, **settings)
    # matrix products of other sizes sum in another order
    apart = flow.inpaint(picture, mask, num_samples=3, batch_size=2, **settings)
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=0)
    torch.testing.assert_close(flow.inpaint(picture, mask, **settings)[0], together[0], atol=1e-4, rtol=0)
    assert not torch.allclose(flow.inpaint(picture, mask, **{**settings, "seed": 5})[0], together[0], atol=1e-2)


def test_no_two_tiles_start_from_the_same_noise(monkeypatch, any_flow):
    used = []

    def watched(flow, images, holes, indices, *rest):
        used.extend(indices.tolist())
        return images

    monkeypatch.setattr("lfm_fast.tasks.inpainting.paint", watched)
    picture, mask = picture_and_mask(40, 40)
    any_flow.inpaint(picture, mask, num_samples=3, fit="tile")
    assert len(used) > 9
    assert len(set(used)) == len(used)


def test_one_picture_is_encoded_once(monkeypatch, approach):
    name, flow = approach
    counts, encode = [], flow.autoencoder.encode
    monkeypatch.setattr(flow.autoencoder, "encode", lambda images: counts.append(len(images)) or encode(images))
    flow.inpaint(*picture_and_mask(SIDE, SIDE), num_samples=5, approach=name, batch_size=2)
    assert counts == [1]


def test_labels_and_guidance_go_to_their_samples(any_flow):
    """With batches of 2, each has its own label and scale, as alone."""
    picture, mask = picture_and_mask(SIDE, SIDE)
    scales = torch.tensor([1.0, 3.0, 2.0])
    images = any_flow.inpaint(picture, mask, num_samples=3, y=["a", "b", "c"], guidance_scale=scales, batch_size=2)
    guidance = LinearGuidance(scales)
    again = any_flow.inpaint(picture, mask, num_samples=3, y=["a", "b", "c"], guidance=guidance, batch_size=2)
    torch.testing.assert_close(again, images, atol=1e-5, rtol=0)
    images_and_holes = torch.from_numpy(picture / 255).permute(2, 0, 1)[None].float(), torch.from_numpy(mask > 0)[None]
    third = paint(any_flow, *images_and_holes, torch.tensor([2]), 0, "project", y="c", sampling={"guidance_scale": 2.0})
    torch.testing.assert_close(third[0][:, mask > 0], images[2][:, mask > 0], atol=1e-4, rtol=0)


def test_the_condition_is_masked_latents_and_the_mask(trained):
    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    holes = torch.rand(2, SIDE, SIDE) < 0.4
    condition = condition_of(trained.autoencoder, images, holes)
    assert condition.shape == (2, 5, SIDE // 2, SIDE // 2)
    masked = images.clone()
    masked[:, 0][holes] = masked[:, 1][holes] = masked[:, 2][holes] = 0.0
    assert torch.equal(condition[:, :4], trained.autoencoder.encode(masked).mean)
    assert torch.equal(condition[:, 4], torch.where(holes[:, ::2, ::2], 1.0, -1.0))


def test_a_trained_flow_is_given_its_condition(trained):
    asked = []
    handle = trained.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append((args, kwargs)), with_kwargs=True
    )
    picture, mask = picture_and_mask(SIDE, SIDE)
    trained.inpaint(picture, mask)
    handle.remove()
    images = torch.from_numpy(picture).permute(2, 0, 1)[None] / 127.5 - 1
    expected = condition_of(trained.autoencoder, images, torch.from_numpy(mask > 0)[None])
    assert len(asked) == 3
    for _, kwargs in asked:
        torch.testing.assert_close(kwargs["condition"], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("image", "mask", "settings", "sentence"),
    [
        (np.zeros((16, 16, 3), np.uint8), np.ones((16, 15), bool), {}, "mask has 16x15 pixels and the image 16x16"),
        (np.zeros((16, 16, 3), np.uint8), np.zeros((16, 16), bool), {}, "no hole, so there is nothing to paint"),
        (np.zeros((16, 16, 3), np.uint8), np.ones((16, 16), bool), {}, "nothing is known of the image"),
        (np.zeros((16, 16, 4), np.uint8), np.ones((16, 16), bool), {}, "expected one RGB picture"),
        (np.full((16, 16, 3), np.nan), np.ones((16, 16), bool), {}, "not finite"),
        (*picture_and_mask(20, 16), {"fit": "refuse"}, "20x16 pixels and the flow 16x16"),
        (*picture_and_mask(20, 16), {"fit": "crop"}, "there is resize, tile, refuse"),
        (*picture_and_mask(16, 16), {"approach": "repaint"}, "there is condition, project, project:resample"),
        (*picture_and_mask(16, 16), {"approach": "condition"}, "was not trained to inpaint; use 'project'"),
        (*picture_and_mask(16, 16), {"num_samples": 0}, "num_samples is 0"),
        (*picture_and_mask(16, 16), {"batch_size": -1}, "batch_size is -1"),
        (*picture_and_mask(16, 16), {"trajectory": True}, "trajectory is for"),
        (*picture_and_mask(16, 16), {"t_start": 0.5}, "t_start cannot be given"),
        (*picture_and_mask(16, 16), {"y": "z"}, "there is no class 'z'"),
        (*picture_and_mask(16, 16), {"resamplings": 0}, "resamplings is 0"),
        (*picture_and_mask(16, 16), {"cuda_graph": True}, "cuda_graph cannot be given"),
        (*picture_and_mask(16, 16), {"indices": [0, 1]}, "indices is"),
    ],
)
def test_misuse_gets_one_sentence(any_flow, image, mask, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        inpaint(any_flow, image, mask, **settings)


@pytest.mark.parametrize("name", ["condition", "resamplings", "pieces"])
def test_what_a_trained_flow_would_not_look_at_is_refused(trained, name):
    value = torch.zeros(1, 9, 4, 4) if name == "condition" else 2
    with pytest.raises(ValueError, match=f"{name} cannot be given to approach 'condition'"):
        trained.inpaint(*picture_and_mask(16, 16), **{name: value})


def test_settings_of_none_are_those_left_out(any_flow, trained):
    for flow in (any_flow, trained):
        plain = flow.inpaint(*picture_and_mask(SIDE, SIDE), **SAMPLING)
        nothing = {"path": None, "preview": None, "condition": None, "model_kwargs": None}
        assert torch.equal(flow.inpaint(*picture_and_mask(SIDE, SIDE), **SAMPLING, **nothing), plain)


@pytest.mark.parametrize("fit", ["resize", "tile"])
def test_samples_have_the_numbers_they_are_given(any_flow, trained, fit):
    for flow in (any_flow, trained):
        settings = {**SAMPLING, "fit": fit}
        three = flow.inpaint(*picture_and_mask(20, 16), num_samples=3, **settings)
        chosen = flow.inpaint(*picture_and_mask(20, 16), num_samples=2, indices=torch.tensor([2, 0]), **settings)
        torch.testing.assert_close(chosen, three[[2, 0]], atol=1e-4, rtol=0)
        assert (three[0] - three[2]).abs().max() > 0.01


def test_a_trained_flow_does_not_project(trained):
    with pytest.raises(ValueError, match="this flow was trained to inpaint"):
        trained.inpaint(*picture_and_mask(16, 16), approach="project")
    other = tiny_flow(in_channels=8)
    with pytest.raises(ValueError, match="conditioned on something else"):
        other.inpaint(*picture_and_mask(16, 16))


def test_a_grey_mask_is_split_and_said(any_flow):
    picture, mask = picture_and_mask(SIDE, SIDE)
    with pytest.warns(UserWarning, match="brighter than half"):
        images = any_flow.inpaint(picture, np.where(mask > 0, 200, 10).astype(np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(any_flow.inpaint(picture, mask), images)


class Noise(ImageSource):
    """Pictures without a file."""

    def __init__(self, count=7):
        super().__init__(SIDE, torch.zeros(count), ["noise"], [str(k) for k in range(count)])
        self.loaded = 0

    def load(self, position):
        self.loaded += 1
        return torch.from_numpy(picture_and_mask(SIDE, SIDE, seed=position)[0]).permute(2, 0, 1)


@pytest.fixture(params=["cached", "encoded"])
def source(request, trained):
    images = Noise()
    if request.param == "cached":
        return MaskedImages(
            CachedLatents.from_images(images, trained.autoencoder, flip=True), images, trained.autoencoder
        )
    return MaskedImages(EncodedImages(images, trained.autoencoder, flip=True), images, trained.autoencoder)


def test_training_conditions_are_functions_of_seed_and_number(source):
    numbers = torch.arange(20, 32)
    condition = source.condition(numbers, 3)
    assert condition.shape == (12, 5, SIDE // 2, SIDE // 2)
    assert torch.equal(source.condition(numbers[4:6], 3), condition[4:6])
    assert torch.equal(source.condition(numbers, 3), condition)
    assert not torch.equal(source.condition(numbers, 4), condition)


def test_latents_and_conditions_are_of_the_same_picture(source, trained):
    """Where the mask says known, and far enough from the hole, both are latents of one image, mirrored or not."""
    numbers = torch.arange(12)
    z_0, y = source.batch(numbers, 3)
    images, holes = source.images_and_holes(numbers, 3)
    posterior = trained.autoencoder.encode(images / 127.5 - 1)
    torch.testing.assert_close(z_0, posterior.sample(numbers, 3), atol=1e-5, rtol=1e-5)
    assert y.tolist() == [0] * 12
    assert torch.equal(source.condition(numbers, 3), condition_of(trained.autoencoder, images / 127.5 - 1, holes))
    assert source.num_items == 7
    assert source.latent_shape == (4, SIDE // 2, SIDE // 2)
    inputs, truths = Inpainting().shown(source, numbers, 3)
    assert torch.equal(truths, images / 255)
    assert (inputs.movedim(1, -1)[holes] == 0.5).all()
    assert torch.equal(inputs.movedim(1, -1)[~holes], truths.movedim(1, -1)[~holes])


def test_images_that_are_read_for_latents_are_not_read_again(trained):
    images = Noise(1000)
    source = MaskedImages(EncodedImages(images, trained.autoencoder), images, trained.autoencoder)
    for step in range(4):
        numbers = torch.arange(8) + 8 * step
        source.batch(numbers, 0)
        source.condition(numbers, 0)
    assert images.loaded <= 8 * 5  # one batch is read ahead


def test_the_task_makes_its_network_and_says_how():
    config = from_preset("embedded", task="inpainting", label_dropout=0.0)
    network = Inpainting().network(config, (4, 16, 16))
    assert (network.in_channels, network.out_channels) == (9, 4)
    example = Inpainting().example(config, 2, (4, 16, 16))
    z = torch.zeros(2, 4, 16, 16)
    assert network(torch.ones(2), z, condition=example).shape == z.shape
    assert Inpainting().settings(config) == {"masks": "mixed", "share": [0.05, 0.75]}


def test_masks_of_training_are_not_files():
    config = from_preset("embedded", task="inpainting", conditions="masks")
    with pytest.raises(ValueError, match="leave --conditions out"):
        Inpainting().images(config)  # before anything is encoded


def test_one_picture_alone_is_not_evaluated(any_flow):
    with pytest.raises(ValueError, match="num_images is 1; give 2 or more"):
        Inpainting().evaluate(any_flow, num_images=1, seed=0, data="embedded")


def test_figures_tell_a_perfect_painter(monkeypatch, any_flow):
    """Who paints the truth has no error and the truth's seams; another image is as far off as it is."""
    import lfm_fast.tasks.inpainting as module

    monkeypatch.setattr(module, "open_images", lambda data, side, split: Noise())
    monkeypatch.setattr(module, "paint", lambda flow, images, *args, **kwargs: images.clone())
    found = Inpainting().evaluate(any_flow, num_images=5, seed=0, data="noise")
    assert found["psnr"] == float("inf")
    assert found["seam"] == found["truth: seam"]
    assert found["images"] == 5
    assert found["another image: psnr"] < found["mean colour: psnr"] < 12
    assert found["unconditional: psnr"] < found["mean colour: psnr"]
    assert 0.05 < found["share of holes"] < 0.75
