import numpy as np
import pytest
import torch

from lfm_fast.data import layouts, open_images
from lfm_fast.data.embedded import CATEGORIES, EmbeddedImages
from lfm_fast.data.layouts import MAX_BOXES, EmbeddedLayouts
from lfm_fast.models.box_encoder import check_boxes

SIZE = 32


@pytest.fixture(scope="module")
def scenes():
    return EmbeddedLayouts(SIZE, num_scenes=600)


def test_boxes_are_whole_pixels_inside_the_picture_and_large_enough_to_see(scenes):
    check_boxes(scenes.boxes, len(CATEGORIES), MAX_BOXES)
    assert scenes.boxes.shape == (600, 4, 5)
    assert scenes.boxes.dtype == torch.float32
    rows = scenes.boxes[scenes.boxes[..., 0] >= 0]
    corners = rows[:, 1:] * SIZE
    assert torch.equal(corners, corners.round())
    longer = (corners[:, 2:] - corners[:, :2]).amax(dim=1)
    assert longer.min() >= 10  # 20 / 64 of the side
    assert longer.max() <= 20  # 40 / 64
    assert len(longer.unique()) >= 9


def test_one_to_four_emoji_of_all_classes(scenes):
    number = (scenes.boxes[..., 0] >= 0).sum(dim=1)
    # 1 to 4 with 1/4 each, and of the crowded some lose a box: 600 draws are off by 0.06 at most in 3 sigma
    shares = torch.bincount(number, minlength=5) / 600
    assert shares[0] == 0
    assert (shares[1:] > 0.13).all()
    assert shares[1] == pytest.approx(0.25, abs=0.06)
    classes = scenes.boxes[..., 0][scenes.boxes[..., 0] >= 0].long()
    per_class = torch.bincount(classes, minlength=9) / len(classes)
    assert (per_class - 1 / 9).abs().max() < 0.035  # 3 sigma of some 1,400 draws is 0.026
    assert scenes.box_classes == list(CATEGORIES)


def test_two_boxes_cover_at_most_a_tenth_of_the_smaller(scenes):
    worst = 0.0
    for boxes in scenes.boxes.double():
        rows = boxes[boxes[:, 0] >= 0, 1:]
        for i in range(len(rows)):
            for j in range(i):
                low, high = torch.maximum(rows[i, :2], rows[j, :2]), torch.minimum(rows[i, 2:], rows[j, 2:])
                areas = [(r[2] - r[0]) * (r[3] - r[1]) for r in (rows[i], rows[j])]
                worst = max(worst, float((high - low).clamp(min=0).prod() / min(areas)))
    assert 0 < worst <= 0.1 + 1e-12


def test_boxes_reach_every_edge_and_those_apart_cover_nothing(scenes):
    there = scenes.boxes[scenes.boxes[..., 0] >= 0]
    assert there[:, 1:3].amin(0).tolist() == [0, 0]
    assert there[:, 3:].amax(0).tolist() == [1, 1]
    for other in ((5, 5, 7, 7), (5, 0, 7, 2), (0, 5, 2, 7), (2, 2, 4, 4)):
        assert layouts._overlap((0, 0, 2, 2), other) == layouts._overlap(other, (0, 0, 2, 2)) == 0
    assert layouts._overlap((0, 0, 2, 2), (1, 1, 5, 5)) == 0.25


def test_ink_fills_each_box_to_its_edges_and_nothing_is_outside(scenes):
    for position in range(60):
        picture = scenes.load(position).int()
        canvas = torch.tensor(scenes._canvases[position]).view(3, 1, 1)
        ink = (picture - canvas).abs().amax(dim=0) > 0
        alone = torch.zeros_like(ink)
        for label, *corners in scenes.boxes[position].tolist():
            if label < 0:
                continue
            left, top, right, bottom = (round(SIZE * value) for value in corners)
            alone[top:bottom, left:right] = True
            rows, columns = ink[top:bottom, left:right].any(1), ink[top:bottom, left:right].any(0)
            # a faint edge pixel may round to the canvas
            assert rows[:2].any(), position
            assert rows[-2:].any(), position
            assert columns[:2].any(), position
            assert columns[-2:].any(), position
        assert not (ink & ~alone).any(), position


def test_a_scene_shows_an_emoji_of_its_class_and_split():
    """The only emoji of a scene, found again by scaling every picture of the class and split to its box."""
    scenes = EmbeddedLayouts(SIZE, num_scenes=40, split="held_out")
    emoji = EmbeddedImages(SIZE, split="held_out")
    single = [i for i in range(40) if (scenes.boxes[i, :, 0] >= 0).sum() == 1]
    for position in single[:6]:
        label, *corners = scenes.boxes[position, 0].tolist()
        left, top, right, bottom = (round(SIZE * value) for value in corners)
        seen = scenes.load(position)[:, top:bottom, left:right].float()
        errors = []
        for k in range(len(emoji)):
            rows, columns = (np.flatnonzero(emoji.mask(k)[0].any(dim).numpy()) for dim in (1, 0))
            rgba = emoji.rgba(k)[None, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].float()
            alpha = rgba[:, 3:] / 255
            canvas = torch.tensor(scenes._canvases[position]).view(1, 3, 1, 1)
            whole = rgba[:, :3] * alpha + canvas * (1 - alpha)
            scaled = torch.nn.functional.interpolate(whole, seen.shape[1:], mode="bilinear", antialias=True)
            errors.append(float((scaled[0] - seen).abs().mean()))
        best = int(np.argmin(errors))
        assert errors[best] < 12, position  # of 255: another filter makes 3 to 8, the next best emoji is 13 to 60 away
        assert emoji.labels[best] == label, position
    assert len(single) >= 6


def test_a_scene_depends_on_its_number_alone(scenes):
    fewer = EmbeddedLayouts(SIZE, num_scenes=5)
    assert torch.equal(fewer.boxes, scenes.boxes[:5])
    assert torch.equal(fewer.batch([4, 1]), scenes.batch([4, 1]))
    assert torch.equal(scenes.batch([4, 1])[1], scenes.load(1))
    assert not torch.equal(scenes.load(1), scenes.load(4))
    assert len(fewer) == fewer.boxes.shape[0] == 5


def test_splits_have_layouts_of_their_own(scenes):
    held_out = EmbeddedLayouts(SIZE, num_scenes=5, split="held_out")
    assert not torch.equal(held_out.boxes, scenes.boxes[:5])
    assert held_out._canvases != scenes._canvases[:5]


def test_open_images_knows_them_by_name(monkeypatch):
    monkeypatch.setitem(__import__("lfm_fast.data.layouts", fromlist=["x"]).NUM_SCENES, "train", 7)
    images = open_images("embedded-layouts", SIZE)
    assert (len(images), images.name, images.num_classes, images.flip) == (7, "embedded-layouts", 1, False)
    assert images.boxes.shape == (7, MAX_BOXES, 5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_size": 4}, "8 to 512"),
        ({"split": "test"}, "split='test'"),
        ({"num_scenes": 0}, "num_scenes=0 must be a positive integer"),
        ({"num_scenes": 2.5}, r"num_scenes=2\.5"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        EmbeddedLayouts(**{"image_size": SIZE, **arguments})
