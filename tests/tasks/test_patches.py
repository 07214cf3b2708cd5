"""Pictures of any kind and size, cut into squares and put together again without a trace."""

import numpy as np
import pytest
import torch
from PIL import Image

from lfm_fast.pictures import to_uint8
from lfm_fast.tasks.patches import Resized, Tiles, filled, read_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
CHANNELS_FIRST = np.ascontiguousarray(PIXELS.transpose(2, 0, 1))
FORMS = {
    "PIL": Image.fromarray(PIXELS),
    "RGBA": Image.fromarray(PIXELS).convert("RGBA"),
    "uint8": PIXELS,
    "channels first": CHANNELS_FIRST,
    "tensor": torch.from_numpy(CHANNELS_FIRST),
    "tensor, channels last": torch.from_numpy(PIXELS),
    "batch of one": torch.from_numpy(CHANNELS_FIRST)[None],
    "float64": PIXELS / 255,
    "other byte order": (PIXELS / 255).astype(">f4"),
    "turned": PIXELS[::-1, ::-1].copy()[::-1, ::-1],
    "read-only": np.asarray(Image.fromarray(PIXELS)),
    "float32": torch.from_numpy(CHANNELS_FIRST).float() / 255,
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_picture_is_read_without_a_loss(name, recwarn):
    picture = read_picture(FORMS[name])
    assert picture.dtype == torch.float32
    assert picture.shape == (3, 5, 7)
    assert np.array_equal(to_uint8(picture[None])[0], PIXELS)
    assert not list(recwarn)


def test_three_by_three_pixels_have_their_channels_where_their_kind_has_them():
    cube = np.random.default_rng(1).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    assert np.array_equal(to_uint8(read_picture(cube)[None])[0], cube)
    assert np.array_equal(to_uint8(read_picture(torch.from_numpy(cube))[None])[0], cube.transpose(1, 2, 0))


def test_files_and_grey_pictures_are_read(tmp_path):
    Image.fromarray(PIXELS[..., 0]).save(tmp_path / "grey.png")
    picture = read_picture(tmp_path / "grey.png")
    assert np.array_equal(to_uint8(picture[None])[0], PIXELS[..., :1].repeat(3, axis=2))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (PIXELS[..., 0], r"shape \(5, 7\)"),
        (np.zeros((5, 7, 4)), r"expected one RGB picture"),
        (np.zeros((2, 5, 7, 3)), r"expected one RGB picture"),
        (np.zeros((0, 7, 3)), r"expected one RGB picture"),
        (PIXELS.astype(np.int64), "holds torch.int64"),
        (np.full((5, 7, 3), np.nan), "not finite"),
        (np.full((5, 7, 3), -1.0), "ranges from -1 to -1"),
        (PIXELS.astype(np.float32), "expected uint8, or floats"),
        ("no/such/file.png", "image no/such/file.png cannot be used"),
        (None, "image is a NoneType"),
        (PIXELS.astype(str), "image holds <U3; expected numbers"),
    ],
)
def test_what_is_no_picture_is_said(image, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_picture(image)


@pytest.fixture
def images():
    return torch.rand(2, 3, 37, 50, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def holes():
    return torch.rand(2, 37, 50, generator=torch.Generator().manual_seed(1)) < 0.7


def test_a_filling_does_not_look_into_the_hole(images, holes):
    fill = filled(images, holes)
    outside = ~holes[:, None].expand_as(images)
    assert torch.equal(fill[outside], images[outside])
    assert images[outside].min() <= fill.min() <= fill.max() <= images[outside].max()
    other = torch.where(outside, images, torch.nan)
    assert torch.equal(filled(other.nan_to_num(99.0), holes), fill)


def test_a_filling_continues_what_is_around():
    """A gradient over a hole comes back to within a few hundredths; the mean of the rest would be off by 0.29."""
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    hole = torch.zeros(1, 64, 64, dtype=torch.bool)
    hole[:, 20:40, 20:40] = True
    assert (filled(ramp, hole) - ramp).abs().max() < 0.15
    flat = torch.full((1, 3, 64, 64), 0.3)
    torch.testing.assert_close(filled(flat, hole), flat, atol=1e-6, rtol=0)


SIZES = [(16, 16), (37, 50), (100, 20), (9, 40), (7, 5)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cutter", [Resized, Tiles])
def test_everything_in_a_hole_is_painted_and_nothing_else(cutter, size):
    """Squares painted in one colour: the hole has it whole, and the rest is to the bit what it was."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, *size, generator=generator)
    holes = torch.rand(size, generator=generator) < 0.2
    holes[0, 0] = True
    result = images
    for _, part, cut, paste in cutter(holes, 16).squares():
        squares = cut(result)
        assert squares.shape == (2, 3, 16, 16)
        assert part.shape == (16, 16)
        assert part.any()
        result = paste(result, torch.full_like(squares, 0.25))
    assert torch.equal(result[..., ~holes], images[..., ~holes])
    assert (result[..., holes] - 0.25).abs().max() < 1e-6  # stretching sums weights that are rounded


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_the_picture_itself(size):
    """Painted with what they hold, as a perfect network would, they give it back to the bit."""
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    truth, holes = images.clone(), torch.ones(size, dtype=torch.bool)
    holes[:3] = False
    for _, _, cut, paste in Tiles(holes, 16).squares():
        images = paste(images, cut(truth))
    assert torch.equal(images, truth)


def test_tiles_close_a_hole_from_its_edges():
    """Every square has something to go by: known at the start, or painted before."""
    holes = torch.zeros(80, 80, dtype=torch.bool)
    holes[8:72, 8:72] = True
    parts = list(Tiles(holes, 16).squares())
    assert len(parts) > 16
    assert all(float(part.float().mean()) <= 0.75 for _, part, _, _ in parts)
    assert len({number for number, *_ in parts}) == len(parts)


def test_what_is_squeezed_is_known_where_no_hole_has_a_part():
    holes = torch.zeros(40, 40, dtype=torch.bool)
    holes[3, 3] = True
    small = Resized(holes, 16).small
    assert small.sum() == 1
    assert small[1, 1]
