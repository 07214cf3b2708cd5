"""Masks: a function of (seed, sample number), with the shares and shapes that are documented; what is read as one."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from lfm_fast.data import masks
from lfm_fast.data.masks import free_form, read_mask, to_latent

NUMBERS = torch.arange(300)


def test_a_mask_depends_on_seed_and_number_alone():
    together = free_form(NUMBERS, 5, 64)
    order = NUMBERS.flip(0)[::3]
    assert torch.equal(free_form(order, 5, 64), together[order])
    assert torch.equal(free_form(NUMBERS[7:8], 5, 64)[0], together[7])
    assert not torch.equal(free_form(NUMBERS, 6, 64), together)
    assert len(together.flatten(1).unique(dim=0)) == len(NUMBERS)


def test_masks_stay_what_they_are():
    """Other masks would be another training run; a few pixels may differ where cosines do."""
    holes = free_form(torch.tensor([0, 1, 2, 10**12]), 0, 64).flatten(1).sum(1)
    torch.testing.assert_close(holes, torch.tensor([606, 2400, 550, 1002]), atol=4, rtol=0)


@pytest.mark.parametrize("kind", masks.KINDS)
@pytest.mark.parametrize("share", [masks.SHARE, (0.4, 0.6)])
def test_holes_take_the_share_asked_for(kind, share):
    found = free_form(NUMBERS, 1, (48, 64), kind=kind, share=share).flatten(1).double().mean(1)
    assert share[0] <= found.min() <= found.max() <= share[1]
    assert found.std() > 0.15 * (share[1] - share[0])  # and not one size for all; a uniform one has 0.29


def test_every_share_can_be_had():
    """Nothing that is drawn fits: one box each, of the share in the middle of the range, here and there."""
    found = free_form(NUMBERS[:50], 0, 16, kind="boxes", share=(0.0, 1.0))
    assert (found.flatten(1).sum(1) > 0).all()
    for share in ((0.0, 0.1), (0.9, 1.0)):
        some = free_form(NUMBERS[:50], 0, 16, kind="strokes", share=share)
        holes = some.flatten(1).double().mean(1)
        assert share[0] <= holes.min() <= holes.max() <= share[1]


@pytest.mark.parametrize(("kind", "most"), [("strokes", 5), ("boxes", 4), ("mixed", 9)])
@pytest.mark.parametrize("size", [16, 64, (40, 90)])
def test_as_many_regions_as_shapes_at_most(kind, most, size):
    counts = [ndimage.label(mask.numpy())[1] for mask in free_form(NUMBERS, 2, size, kind=kind)]
    assert min(counts) == 1
    assert 1 < max(counts) <= most


def test_kinds_are_what_they_are_called():
    """A box touches its bounding box everywhere along its sides; strokes have round ends and no such corners."""
    boxes = free_form(NUMBERS, 0, 64, kind="boxes")
    single = [mask for mask in boxes if mask.any(1).sum() * mask.any(0).sum() == mask.sum()]
    assert len(single) > 0.15 * len(boxes)  # one box of one to four, where large enough
    mixed = free_form(NUMBERS, 0, 64)
    rectangles = sum(bool(mask.any(1).sum() * mask.any(0).sum() == mask.sum()) for mask in mixed)
    assert 0.03 * len(mixed) < rectangles < len(single)
    strokes = free_form(NUMBERS, 0, 64, kind="strokes")
    assert not any(bool(mask.any(1).sum() * mask.any(0).sum() == mask.sum()) for mask in strokes)


def test_a_segment_is_all_within_its_radius():
    """Row by row against the distance of every pixel; also upright, level and of no length."""
    generator = np.random.default_rng(0)
    ends = generator.uniform(0, 40, (60, 4))
    ends[0, 2], ends[1, 3], ends[2, 2:] = ends[0, 0], ends[1, 1], ends[2, :2]
    radius = generator.uniform(1, 12, 60)
    x0, y0, x1, y1, r = (torch.from_numpy(column)[:, None] for column in (*ends.T, radius))
    middles = torch.arange(40, dtype=torch.float64) + 0.5
    found = masks._fill(torch.arange(60), *masks._capsule(x0, y0, x1, y1, r, middles), 60, 40)
    for k in range(60):
        a, b, p = ends[k, :2], ends[k, 2:], np.stack(np.meshgrid(middles, middles), -1)
        along = np.clip(((p - a) @ (b - a)) / max((b - a) @ (b - a), 1e-300), 0, 1)
        distance = np.linalg.norm(p - a - along[..., None] * (b - a), axis=-1)
        assert np.array_equal(found[k].numpy(), distance <= radius[k])


def test_mirrors_and_masks_share_no_numbers(monkeypatch):
    """Block 0 of the stream is the mirrors'."""
    offsets = []
    uniform = masks.ops.philox_uniform

    def watched(index, numel, seed, stream, offset=0):
        offsets.append((offset, offset + (numel + 3) // 4))
        return uniform(index, numel, seed, stream, offset)

    monkeypatch.setattr(masks.ops, "philox_uniform", watched)
    free_form(NUMBERS[:50], 0, 16, kind="strokes", share=(0.9, 1.0))
    assert offsets[0][0] == 1
    assert all(end <= start for (_, end), (start, _) in pairwise(offsets))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": 8}, "at least 16 pixels"),
        ({"size": 64.0}, "size is 64.0"),
        ({"size": 64, "kind": "clouds"}, "there is mixed, strokes, boxes"),
        ({"size": 64, "share": (0.5, 0.55)}, "at least 0.1 apart"),
        ({"size": 64, "share": 0.5}, "expected .low, high."),
        ({"size": 64, "share": (0.5, 1.5)}, "within"),
    ],
)
def test_what_cannot_be_drawn_is_said(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        free_form(NUMBERS, 0, **arguments)


def test_latents_take_the_nearest_pixel():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, :4, 3:] = True
    expected = torch.tensor([[[[-1.0, 1.0], [-1.0, -1.0]]]])
    assert torch.equal(to_latent(mask, (2, 2)), expected)


HALF = np.array([[0, 0, 255], [0, 255, 255]], np.uint8)
FORMS = {
    "uint8": HALF,
    "ones": HALF // 255,
    "bool": HALF > 0,
    "float": HALF / np.float32(255),
    "channel first": HALF[None],
    "channel last": HALF[..., None],
    "tensor": torch.from_numpy(HALF),
    "tensor of int64": torch.from_numpy(HALF // 255).long(),
    "L": Image.fromarray(HALF),
    "1": Image.fromarray(HALF).convert("1"),
    "RGB": Image.fromarray(HALF).convert("RGB"),
    "RGBA": Image.fromarray(HALF).convert("RGBA"),
    "P": Image.fromarray(HALF).convert("P"),
    "16 bits": Image.fromarray(HALF.astype(np.uint16) * 257),
    "16 bits of 8": Image.fromarray(HALF.astype(np.uint16)),
    "32 bits of 8": Image.fromarray(HALF.astype(np.int32)),
    "array of 16 bits": HALF.astype(np.uint16) * 257,
    "array of 16 bits of 1": HALF.astype(np.uint16) // 255,
    "other byte order": HALF.astype(">i4"),
    "turned": HALF[::-1, ::-1].copy()[::-1, ::-1],
    "holes cut out": Image.fromarray(np.dstack([HALF * 0, HALF * 0, HALF * 0, 255 - HALF])),
}


@pytest.mark.parametrize("name", FORMS)
def test_white_is_the_hole(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = read_mask(FORMS[name])
        assert mask.dtype == torch.bool
        assert np.array_equal(mask.numpy(), HALF > 0)
        assert np.array_equal(read_mask(FORMS[name], hole=0).numpy(), HALF == 0)


def test_masks_come_from_files(tmp_path):
    file = tmp_path / "mask.png"
    for name in ("L", "P", "16 bits", "16 bits of 8", "holes cut out"):
        (FORMS[name] if isinstance(FORMS[name], Image.Image) else Image.fromarray(FORMS[name])).save(file)
        assert np.array_equal(read_mask(file).numpy(), HALF > 0), name
    assert np.array_equal(read_mask(str(file)).numpy(), HALF > 0)


def test_grey_is_split_at_half_and_said():
    with pytest.warns(UserWarning, match="brighter than half"):
        assert read_mask(np.array([[3, 127, 128, 255]], np.uint8)).tolist() == [[False, False, True, True]]
    with pytest.warns(UserWarning, match="brighter than half"):
        assert read_mask(torch.tensor([[0.2, 0.5, 1.0]])).tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (np.zeros((4, 4, 3)), r"shape \(4, 4, 3\); expected \(H, W\)"),
        (np.zeros((0, 4)), "shape"),
        (np.array([[-1.0, 1.0]]), "ranges from -1 to 1"),
        (np.array([[0, 300]]), "ranges from 0 to 300"),
        (np.array([[0.0, np.nan]]), "not finite"),
        ([[0, 1]], "mask is a list"),
        (np.array([["0", "1"]]), "mask holds <U1; expected numbers"),
        (np.array([[0, 1j]]), "mask holds torch.complex128; expected bool"),
        (Image.fromarray(np.array([[0, 70000]], np.int32)), "ranges from 0 to 70000"),
        ("no/such/mask.png", "cannot be opened"),
    ],
)
def test_what_is_no_mask_is_said(mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_mask(mask)
    with pytest.raises(ValueError, match="hole is 1;"):
        read_mask(HALF, hole=1)


def test_a_number_of_floats_is_not_taken_for_one_of_bytes():
    for values, sentence in (([0.0, 200.0], "mask ranges from 0 to 200"), ([-1.0, 1.0], "mask ranges from -1 to 1")):
        with pytest.raises(ValueError, match=sentence):
            read_mask(np.array([values]))


@pytest.mark.parametrize("hole", [True, False, 1, None])
def test_what_is_no_colour_of_holes(hole):
    with pytest.raises(ValueError, match=f"hole is {hole};"):
        read_mask(np.array([[0, 255]], np.uint8), hole=hole)


@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24)])
def test_strokes_by_the_distance_of_every_pixel(height, width):
    """A pixel is in the hole where its middle is within the radius of a chain; corners are reflected one by one."""
    u = torch.rand(6, masks._STROKES, masks._STROKE_WORDS, generator=torch.Generator().manual_seed(2)).double()
    u[..., 4 : 4 + masks._SEGMENTS] = u[..., 4 : 4 + masks._SEGMENTS].sqrt()  # long ones, which leave the picture
    count = torch.tensor([1, 2, 3, 1, 5, 1])
    drawn = masks._fill(*masks._strokes(u, count, height, width), 6, width).numpy()
    rows, columns = np.mgrid[:height, :width] + 0.5
    side, reflected = min(height, width), 0
    for mask, chains, number in zip(drawn, u.tolist(), count.tolist()):
        expected, near = np.zeros((height, width), bool), np.zeros((height, width), bool)
        for words in chains[:number]:
            radius = max(1.0, side * (0.05 + 0.35 * words[0]) / 2)
            x, y = words[2] * width, words[3] * height
            for k in range(int(words[1] * masks._SEGMENTS) + 1):
                length, angle = side * (0.05 + 0.75 * words[4 + k]), 2 * np.pi * words[4 + masks._SEGMENTS + k]
                end = [x + np.cos(angle) * length, y + np.sin(angle) * length]
                for axis, extent in enumerate((width, height)):
                    if not 0 <= end[axis] <= extent:
                        end[axis], reflected = (-end[axis] if end[axis] < 0 else 2 * extent - end[axis]), reflected + 1
                dx, dy = end[0] - x, end[1] - y
                along = np.clip(((columns - x) * dx + (rows - y) * dy) / (dx * dx + dy * dy), 0, 1)
                distance = np.hypot(columns - x - along * dx, rows - y - along * dy)
                expected |= distance <= radius
                near |= np.abs(distance - radius) < 1e-6  # where rounding may decide
                x, y = end
        assert np.array_equal(mask | near, expected | near)
    assert reflected > 5
