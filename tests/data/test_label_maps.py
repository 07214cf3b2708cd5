import numpy as np
import pytest
import torch
from PIL import Image

from lfm_fast.data import embedded, label_maps, open_images
from lfm_fast.data.palettes import PALETTES, bit_colours, get_palette
from lfm_fast.data.reading import centre_crop
from lfm_fast.metrics.segmentation import map_agreement

EACH = sorted(PALETTES)


def random_map(palette, shape=(13, 17), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(palette), shape, generator=generator)


def test_palettes_have_the_published_numbers_of_classes():
    assert {name: len(PALETTES[name]) for name in EACH} == {
        "celebamask-hq": 19,
        "ade20k": 1 + 150,
        "coco-stuff": 1 + 182,
        "embedded": 1 + 22,
    }
    for palette in PALETTES.values():
        assert len(set(palette.classes)) == len(palette), palette.name


# spot checks from the data sets' own lists, not from the tables that the palettes are made of
@pytest.mark.parametrize(
    ("name", "label", "word", "colour"),
    [
        ("celebamask-hq", 1, "skin", (204, 0, 0)),
        ("celebamask-hq", 18, "cloth", (0, 204, 0)),
        ("ade20k", 1, "wall", (120, 120, 120)),
        ("ade20k", 3, "sky", (6, 230, 230)),
        ("ade20k", 150, "flag", (92, 0, 255)),
        ("coco-stuff", 0, "unlabelled", (0, 0, 0)),
        ("coco-stuff", 1, "person", (128, 0, 0)),
        ("coco-stuff", 91, "hair brush", (224, 192, 0)),
        ("coco-stuff", 112, "door-stuff", (32, 64, 64)),
        ("coco-stuff", 182, "wood", (0, 224, 192)),
        ("embedded", 9, "yellow", (252, 234, 43)),
    ],
)
def test_names_and_colours(name, label, word, colour):
    palette = get_palette(name)
    assert palette.classes[label] == word
    assert palette.colours[label] == colour


def test_maps_are_found_under_every_name_of_their_folder(tmp_path):
    (tmp_path / "real").mkdir()
    Image.new("L", (2, 2)).save(tmp_path / "real" / "1.png")
    for link, to in (("alias", "real"), ("real/back", ".")):
        (tmp_path / link).symlink_to(tmp_path / to)
    assert label_maps._maps_below(tmp_path).keys() == {"real/1", "alias/1"}


def test_bit_colours_are_pascal_vocs():
    # PASCAL VOC's development kit: 15 is person, 20 the monitor, 255 the border
    assert [bit_colours(256)[k] for k in (15, 20, 255)] == [(192, 128, 128), (0, 64, 128), (224, 224, 192)]


def test_an_unknown_palette_is_refused():
    with pytest.raises(ValueError, match=r"palette is 'cityscapes'; there is embedded, "):
        get_palette("cityscapes")


@pytest.mark.parametrize("name", EACH)
def test_a_written_map_is_read_back(name, tmp_path):
    ids = random_map(PALETTES[name], (32, 40))
    label_maps.write_label_map(tmp_path / "map.png", ids, name)
    assert torch.equal(label_maps.read_label_map(tmp_path / "map.png", name), ids)
    shown = np.array(Image.open(tmp_path / "map.png").convert("RGB"))
    assert np.array_equal(shown, label_maps.draw(ids, name).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("mode", ["L", "P", "I", "I;16", "1"])
def test_every_mode_that_holds_ids(mode, tmp_path):
    ids = random_map(range(2)) if mode == "1" else random_map(PALETTES["celebamask-hq"])
    pixels = ids.numpy().astype({"I": np.int32, "I;16": np.uint16}.get(mode, np.uint8))
    picture = Image.fromarray(pixels * 255).convert("1") if mode == "1" else Image.fromarray(pixels)
    if mode == "P":
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    assert picture.mode == mode
    picture.save(tmp_path / "map.tif")
    read = label_maps.read_label_map(tmp_path / "map.tif", "celebamask-hq")
    assert read.dtype == torch.int64
    assert torch.equal(read, ids)


@pytest.mark.parametrize("name", ["celebamask-hq", "coco-stuff", "embedded"])
def test_palette_colours_are_read(name, tmp_path):
    ids = random_map(PALETTES[name])
    picture = Image.fromarray(label_maps.draw(ids, name).permute(1, 2, 0).numpy())
    picture.save(tmp_path / "map.png")
    picture.quantize(256, dither=Image.Dither.NONE).save(tmp_path / "indexed.png")
    assert torch.equal(label_maps.read_label_map(tmp_path / "map.png", name), ids)
    assert torch.equal(label_maps.read_label_map(tmp_path / "indexed.png", name, holds="colours"), ids)


def save(folder, pixels, name="map.png"):
    Image.fromarray(pixels).save(folder / name)
    return folder / name


def test_what_cannot_be_a_map_is_refused(tmp_path):
    grey = np.zeros((4, 6), np.uint8)
    grey[2, 5] = 19
    with pytest.raises(ValueError, match=r"the value 19 at row 2, column 5 is no id of celebamask-hq, .* 0 to 18\.$"):
        label_maps.read_label_map(save(tmp_path, grey), "celebamask-hq")
    with pytest.raises(ValueError, match=r"value 200 at row 0, column 0 .* stored as 0 to 181 and 255\.$"):
        label_maps.read_label_map(save(tmp_path, grey + 200), "coco-stuff")
    colour = np.zeros((4, 6, 3), np.uint8)
    colour[1, 3] = (204, 0, 1)
    with pytest.raises(ValueError, match=r"colour \(204, 0, 1\) at row 1, column 3 is no colour of celebamask-hq"):
        label_maps.read_label_map(save(tmp_path, colour), "celebamask-hq")
    with pytest.raises(ValueError, match=r"\(140, 140, 140\) at row 0, column 0 is shared by road and skyscraper"):
        label_maps.read_label_map(save(tmp_path, np.full((2, 2, 3), 140, np.uint8)), "ade20k")
    clear = np.zeros((2, 2, 4), np.uint8)
    with pytest.raises(ValueError, match="transparent pixels"):
        label_maps.read_label_map(save(tmp_path, clear), "celebamask-hq")
    with pytest.raises(ValueError, match="is a JPEG, whose loss invents ids"):
        label_maps.read_label_map(save(tmp_path, colour, "map.jpg"), "celebamask-hq")
    with pytest.raises(ValueError, match="mode LA are no ids"):
        label_maps.read_label_map(save(tmp_path, clear[..., :2]), "celebamask-hq")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be used: it is not an image"):
        label_maps.read_label_map(tmp_path / "broken.png", "celebamask-hq")
    with pytest.raises(ValueError, match="holds='numbers' is not known"):
        label_maps.read_label_map(save(tmp_path, grey), "celebamask-hq", holds="numbers")


def test_ids_are_checked():
    with pytest.raises(ValueError, match=r"the id 19 at row 1, column 0, but the ids of celebamask-hq are 0 to 18"):
        label_maps.check_ids(torch.tensor([[[0, 1]], [[2, 3]], [[4, 5]]]).transpose(1, 2) + 14, "celebamask-hq")
    with pytest.raises(ValueError, match=r"the id -1 at row 0, column 1"):
        label_maps.draw(torch.tensor([[0, -1]]), "ade20k")
    for wrong in (torch.zeros(2, 2), torch.zeros(3, dtype=torch.int64), torch.zeros(0, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="expected whole-number ids"):
            label_maps.check_ids(wrong, "ade20k")
    assert label_maps.check_ids(np.array([[3]], np.uint8), "ade20k").dtype == torch.int64


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (26, 34), (40, 9)])
def test_resize_takes_the_nearest_pixel(size):
    ids = random_map(range(9))
    picture = Image.fromarray(ids.numpy().astype(np.uint8))
    expected = np.array(picture.resize(size[::-1], Image.Resampling.NEAREST))
    assert np.array_equal(label_maps.resize(ids, *size).numpy(), expected)


@pytest.mark.parametrize("shape", [(64, 64), (65, 131), (200, 90), (31, 20), (9, 150)])
@pytest.mark.parametrize("size", [8, 16])
def test_a_map_is_cut_where_its_image_is(shape, size):
    """An image whose two halves differ, and the map of its halves, agree after the crop, but for the blurred edge."""
    ids = torch.zeros(shape, dtype=torch.int64)
    ids[shape[0] // 3 :, shape[1] // 2 :] = 1
    picture = Image.fromarray((ids.numpy() * 255).astype(np.uint8)).convert("RGB")
    image = torch.from_numpy(centre_crop(picture, size)[..., 0].astype(np.int64))
    cut = label_maps.centre_square(ids, size)
    assert cut.shape == (size, size)
    sure = (image <= 20) | (image >= 235)
    assert sure.float().mean() > 0.6
    assert torch.equal(cut[sure], (image[sure] > 128).long())


def test_mirrored_faces_have_left_and_right_swapped():
    palette = get_palette("celebamask-hq")
    left, right = palette.classes.index("l_eye"), palette.classes.index("r_eye")
    face = torch.tensor([[0, left, 2, right]])
    assert palette.mirror(face).tolist() == [[left, 2, right, 0]]
    assert palette.mirror(torch.tensor([[11, 12, 13]])).tolist() == [[13, 12, 11]]  # lips are upper and lower
    for each in PALETTES.values():
        ids = random_map(each)
        assert torch.equal(each.mirror(each.mirror(ids)), ids)


def test_nearest_colour_against_numpy():
    rng = np.random.default_rng(0)
    pixels, colours = rng.integers(0, 256, (5, 11, 7, 3)), rng.integers(0, 256, (23, 3))
    expected = ((pixels[..., None, :].astype(np.int64) - colours) ** 2).sum(-1).argmin(-1)
    found = label_maps.nearest_colour(torch.tensor(pixels, dtype=torch.uint8), torch.tensor(colours))
    assert np.array_equal(found.numpy(), expected)
    equal = torch.tensor([[0, 0, 0], [10, 0, 0], [0, 0, 0]])
    assert label_maps.nearest_colour(torch.tensor([[[5, 0, 0], [6, 0, 0], [0, 0, 0]]]), equal).tolist() == [[0, 1, 0]]


def test_maps_of_the_embedded_set():
    images = open_images("embedded", 32, split="held_out")
    rgba = torch.stack([images.rgba(i) for i in range(len(images))])
    maps = label_maps.of_embedded(rgba)
    palette = get_palette("embedded")
    assert maps.shape == (len(images), 32, 32)
    assert torch.equal(maps == 0, rgba[:, 3] < 128)
    assert set(range(1, 23)) <= set(maps.unique().tolist())
    # where a pixel is plainly one of the colours, the map says so, and shows it
    solid = (rgba[:, 3] == 255) & (rgba[:, :3] == torch.tensor([252, 234, 43])[:, None, None]).all(1)
    assert solid.sum() > 1000
    assert (maps[solid] == palette.classes.index("yellow")).all()
    drawn = label_maps.draw(maps, palette)
    on_white = embedded.on_white(rgba)
    opaque = (rgba[:, 3:] == 255).expand_as(drawn)
    off = (drawn.float() - on_white.float()).abs()[opaque]
    assert (off == 0).float().mean() > 0.4  # the rest are mixtures along edges, which are wide at this size
    assert off.mean() < 0.2 * (drawn.roll(1, 0).float() - on_white.float()).abs()[opaque].mean()


def test_embedded_pictures_agree_with_their_own_maps_alone():
    images = open_images("embedded", 32, split="held_out")
    pictures = images.batch(range(len(images)))
    maps = label_maps.of_embedded(torch.stack([images.rgba(i) for i in range(len(images))]))
    own, others = map_agreement(pictures, maps), map_agreement(pictures.roll(7, 0), maps)
    assert own.mean_iou > 0.8  # what is missing are mixtures along edges
    assert own.accuracy > 0.9
    assert others.mean_iou < 0.15


def test_images_and_maps_are_paired_by_stem(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "4.png", "5.png", "5.bmp", "c/6.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save(tmp_path, np.zeros((2, 2), np.uint8), name)
    # in the same sub-folder, or in the folder itself; never in another sub-folder
    paths, report = label_maps.pair_by_stem(["a/1.jpg", "a/2.webp", "b/1.png", "b/3.jpg", "b/2.jpg", "b/4.x"], tmp_path)
    found = [path and path.relative_to(tmp_path).as_posix() for path in paths]
    assert found == ["a/1.png", "a/2.png", "b/1.png", None, None, None]
    assert report.skipped == [(name, "it has no label map") for name in ("b/3.jpg", "b/2.jpg", "b/4.x")]
    assert label_maps.pair_by_stem(["b/4.jpg"], tmp_path)[0] == [tmp_path / "4.png"]
    with pytest.raises(ValueError, match=r"has two label maps for a/5\.jpg: 5\.bmp and 5\.png"):
        label_maps.pair_by_stem(["a/5.jpg"], tmp_path)
    with pytest.raises(ValueError, match=r"4\.png would be the label map of both a/4\.jpg and b/4\.jpg"):
        label_maps.pair_by_stem(["a/4.jpg", "b/4.jpg"], tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        label_maps.pair_by_stem(["1.jpg"], tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no label map"):
        label_maps.pair_by_stem(["1.jpg"], tmp_path / "empty")


def test_maps_in_any_form():
    ids = random_map(PALETTES["coco-stuff"], (6, 8))
    colours = label_maps.draw(ids, "coco-stuff").permute(1, 2, 0)
    stored = torch.where(ids == 0, 255, ids - 1).numpy().astype(np.uint8)
    turned, swapped = ids.numpy()[::-1].copy()[::-1], ids.numpy().astype(">i4")
    for given in (ids, ids.numpy(), ids.tolist(), ids.short(), colours, colours.numpy(), Image.fromarray(stored)):
        assert torch.equal(label_maps.as_label_maps(given, "coco-stuff"), ids[None])
    for given in (turned, swapped, swapped.astype(np.uint16)):
        assert torch.equal(label_maps.as_label_maps(given, "coco-stuff"), ids[None])
    assert torch.equal(label_maps.as_label_maps(torch.stack([ids, ids]), "coco-stuff"), torch.stack([ids, ids]))
    for wrong, says in (
        (ids.float(), "expected whole-number ids"),
        (ids[0], r"label_map has shape \(8,\); expected \(H, W\), \(N, H, W\) or \(H, W, 3\) colours"),
        (colours[..., [0, 1, 2, 0]], r"label_map has shape \(6, 8, 4\); expected"),
        (ids[..., None], r"label_map has shape \(6, 8, 1\); expected"),
        (colours.long(), r"label_map has shape \(6, 8, 3\); expected"),
        (ids.numpy().astype(str), r"label_map holds <U\d+; expected numbers"),
        (None, "label_map is NoneType; expected a path, a PIL image, or an array"),
        (ids + 183, "but the ids of coco-stuff are 0 to 182"),
    ):
        with pytest.raises(ValueError, match=says):
            label_maps.as_label_maps(wrong, "coco-stuff")


def test_ids_that_are_not_stored_are_named_whatever_their_sign():
    for value in (-1, -(2**40), 19, 2**40):
        with pytest.raises(ValueError, match=f"the value {value} at row 1, column 0 is no id of celebamask-hq"):
            label_maps.from_stored(torch.tensor([[0], [value]]), "celebamask-hq")


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.JPE", "a.jfif"])
def test_files_with_loss_are_refused_by_name(tmp_path, name):
    Image.new("L", (4, 4)).save(tmp_path / name, "PNG")
    with pytest.raises(ValueError, match="is a JPEG, whose loss invents ids"):
        label_maps.read_label_map(tmp_path / name, "celebamask-hq")


def test_colours_of_which_some_are_transparent_are_refused():
    picture = Image.new("RGBA", (2, 1), (204, 0, 0, 255))
    assert label_maps.from_picture(picture, "celebamask-hq").tolist() == [[1, 1]]
    picture.putpixel((1, 0), (204, 0, 0, 254))
    with pytest.raises(ValueError, match="it has transparent pixels"):
        label_maps.from_picture(picture, "celebamask-hq")


def test_a_batch_of_maps_is_told_from_pixels_with_channels():
    assert label_maps.as_label_maps(torch.zeros(2, 4, 5, dtype=torch.int64), "celebamask-hq").shape == (2, 4, 5)
    for channels in (1, 2, 3, 4):
        with pytest.raises(ValueError, match=rf"label_map has shape \(5, 5, {channels}\)"):
            label_maps.as_label_maps(torch.zeros(5, 5, channels, dtype=torch.int64), "celebamask-hq")


@pytest.mark.parametrize(
    ("shape", "size", "scaled"),
    [
        ((131, 257), 32, (32, 64)),  # halved to 65 x 128 and 32 x 64
        ((64, 131), 32, (32, 65)),  # halved once, to just the size
        ((63, 130), 32, (32, 66)),  # not at all: 130 * 32 / 63
    ],
)
def test_a_map_is_halved_as_its_image_is(shape, size, scaled):
    """With the roundings of odd sides, which move the middle by a pixel."""
    ids = torch.arange(shape[0] * shape[1]).view(shape)
    top, left = (scaled[0] - size) // 2, (scaled[1] - size) // 2
    expected = label_maps.resize(ids, *scaled)[top : top + size, left : left + size]
    assert torch.equal(label_maps.centre_square(ids, size), expected)


def test_a_long_map_is_never_enlarged_whole(monkeypatch):
    asked, resize = [], label_maps.resize
    monkeypatch.setattr(label_maps, "resize", lambda ids, *sides: asked.append(sides) or resize(ids, *sides))
    assert label_maps.centre_square(torch.zeros(20, 4000), 64).shape == (64, 64)
    assert asked == [(64, 8 * 64)]


@pytest.mark.parametrize("name", EACH)
def test_a_colour_above_all_of_a_palette_is_refused(name):
    colours = get_palette(name).table()
    if (255, 255, 255) in map(tuple, colours.tolist()):
        return
    pixels = torch.stack((colours[0], torch.full((3,), 255, dtype=torch.uint8)))[None]
    with pytest.raises(ValueError, match=r"the colour \(255, 255, 255\) at row 0, column 1 is no colour of"):
        label_maps.from_colours(pixels, name)


def test_runs_of_numbers_in_words():
    assert label_maps._ranges((255, 0, 1, 4, 3, 9)) == "0 to 1 and 3 to 4 and 9 and 255"


def test_maps_are_paired_whatever_the_case_of_a_suffix_and_without_hidden_ones(tmp_path):
    for name in ("1.PNG", "._1.png", ".2.png"):
        Image.new("L", (4, 4)).save(tmp_path / name, "PNG")
    found, report = label_maps.pair_by_stem(["1.JPG", "2.jpg"], tmp_path)
    assert found == [tmp_path / "1.PNG", None]
    assert report.skipped == [("2.jpg", "it has no label map")]
