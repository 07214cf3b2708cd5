import json

import numpy as np
import pytest
import torch
from PIL import Image

from lfm_fast.data.boxes import as_boxes, cropped, draw_boxes, folder_boxes, folder_classes, mirrored, read_layouts
from lfm_fast.data.folder import FolderImages

NAMES = ["dog", "cat", "polar bear"]
CAT = {"class": "cat", "box": [0.25, 0, 0.5, 0.75]}
BEAR = {"class": 2, "box": [0, 0.5, 1, 1]}


def test_a_list_of_boxes_becomes_rows():
    boxes = as_boxes([CAT, BEAR], NAMES, max_boxes=3)
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == [[1, 0.25, 0, 0.5, 0.75], [2, 0, 0.5, 1, 1], [-1, 0, 0, 0, 0]]
    assert torch.equal(as_boxes(boxes.double(), NAMES), boxes)
    assert as_boxes([], NAMES).shape == (0, 5)
    assert torch.equal(as_boxes([], NAMES, max_boxes=2)[:, 0], torch.tensor([-1.0, -1.0]))


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ([{"class": "bird", "box": CAT["box"]}], "box class 'bird' is not known: choose one of dog, cat, polar bear"),
        ([{"class": 3, "box": CAT["box"]}], "box class 3 is not known: classes are 0 to 2"),
        ([{"class": -1, "box": CAT["box"]}], "box class -1 is not known"),
        ([{"class": 0.5, "box": CAT["box"]}], r"box class 0\.5 is not known"),
        ([{"class": None, "box": CAT["box"]}], "box class None is not known"),
        ([{"class": True, "box": CAT["box"]}], "box class True is not known"),
        ([{"class": 2**60, "box": CAT["box"]}], "box class 1152921504606846976 is not known: choose one of"),
        ([{"class": "cat", "box": [0, 0, True, 1]}], "expected four numbers"),
        ([{"class": "cat", "box": [0, 0, 1 + 1e-9, 1]}], "leaves the image"),
        ([{"class": "cat", "box": [0.5, 0, 0.25, 0.75]}], r"\(0.5, 0, 0.25, 0.75\) has no area"),
        ([{"class": "cat", "box": [0, 0.5, 0.25, 0.5]}], "has no area"),
        ([{"class": "cat", "box": [0, 0, 64, 64]}], r"\(0, 0, 64, 64\) leaves the image; coordinates go from 0 to 1"),
        ([{"class": "cat", "box": [-0.1, 0, 0.5, 0.5]}], "leaves the image"),
        ([{"class": "cat", "box": [0, 0, 1]}], "expected four numbers"),
        ([{"class": "cat", "box": [0, 0, 1, "1"]}], "expected four numbers"),
        ([{"class": "cat", "box": [0, 0, 1, float("nan")]}], "not finite"),
        ([{"class": "cat"}], 'expected {"class"'),
        ([[1, 0, 0, 1, 1]], 'expected {"class"'),
        ({"class": "cat", "box": CAT["box"]}, "a layout is a dict"),
        ([CAT] * 5, "has 5 boxes, but the network was made for 4 at most"),
        (torch.zeros(2, 3, 5), r"a layout is \(2, 3, 5\)"),
        (torch.zeros(2, 4), r"boxes are \(2, 4\)"),
    ],
)
def test_a_bad_layout_gets_one_sentence(layout, words):
    with pytest.raises(ValueError, match=words) as error:
        as_boxes(layout, NAMES, max_boxes=4)
    assert str(error.value).count(". ") == 0


def test_files_hold_one_layout_or_several(tmp_path):
    file = tmp_path / "layout.json"
    file.write_text(json.dumps([CAT, BEAR]))
    assert torch.equal(read_layouts(file, NAMES)[0], as_boxes([CAT, BEAR], NAMES))
    file.write_text(json.dumps([[CAT], [BEAR, CAT]]))
    boxes = read_layouts(str(file), NAMES, max_boxes=4)
    assert boxes.shape == (2, 4, 5)
    assert torch.equal(boxes[1], as_boxes([BEAR, CAT], NAMES, 4))
    assert torch.equal(read_layouts(file, NAMES)[0], as_boxes([CAT], NAMES, 2))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[{", r"layout\.json is no JSON"),
        (json.dumps([[CAT], [{"class": "bird", "box": [0, 0, 1, 1]}]]), r"layout\.json: box class 'bird'"),
        (json.dumps("cat"), r"layout\.json: a layout is a str"),
        (None, r"layout\.json cannot be read \(No such file"),
    ],
)
def test_a_bad_file_is_named(tmp_path, text, words):
    file = tmp_path / "layout.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_layouts(file, NAMES)


def _paint(folder, name, size, box):
    """A white picture with a black box, and its layout beside it."""
    pixels = np.full((size[1], size[0], 3), 255, np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 0
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    relative = [left / size[0], top / size[1], right / size[0], bottom / size[1]]
    path.with_suffix(".json").write_text(json.dumps([{"class": "cat", "box": relative}]))


@pytest.mark.parametrize("size", [(96, 64), (64, 128), (64, 64)])
def test_boxes_beside_images_follow_the_centre_crop(tmp_path, size):
    _paint(tmp_path, "k/one.png", size, (40, 20, 60, 52))
    images = FolderImages(tmp_path, 32)
    boxes, names = folder_boxes(images, tmp_path)
    assert names == ["cat"]
    dark = images.load(0)[0] < 128
    rows, columns = dark.any(1).nonzero().flatten(), dark.any(0).nonzero().flatten()
    seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 32
    assert (boxes[0, 0, 1:] - seen).abs().max() <= 0.5 / 32 + 1e-6  # half a pixel: the edge of what is dark


def test_what_the_crop_leaves_next_to_nothing_of_is_left_out():
    # of a picture 200 x 100 the middle 100 columns stay: a box from 40 to 60 keeps half, one from 0 to 60 a sixth
    boxes = torch.tensor([[0, 0.2, 0, 0.3, 1], [1, 0.0, 0, 0.3, 1], [2, 0.1, 0, 0.2, 1], [-1, 0, 0, 0, 0]])
    kept = cropped(boxes, 200, 100)
    torch.testing.assert_close(kept, torch.tensor([[0, 0.0, 0, 0.1, 1]]))


def test_a_quarter_of_a_box_is_enough_to_keep_it():
    """The middle of 200 x 100 begins at 0.25: of these a quarter, a little less, and a little more lies in it."""
    boxes = torch.tensor([[0, 0.0625, 0, 0.3125, 1], [1, 0.0625, 0, 0.3105, 1], [2, 0.0625, 0, 0.3205, 1]])
    assert cropped(boxes, 200, 100)[:, 0].tolist() == [0, 2]
    turned = boxes[:, [0, 2, 1, 4, 3]]
    assert cropped(turned, 100, 200)[:, 0].tolist() == [0, 2]


def test_layouts_without_a_box(tmp_path):
    for text, shape in (("[]", (1, 1, 5)), ("[[], []]", (2, 1, 5))):
        (tmp_path / "a.json").write_text(text)
        boxes = read_layouts(tmp_path / "a.json", NAMES)
        assert (tuple(boxes.shape), boxes[..., 0].unique().tolist()) == (shape, [-1])
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "classes.json").write_text(json.dumps(NAMES))  # a list too, but of no boxes
    assert folder_classes(tmp_path) == (NAMES, 1)


def test_classes_share_colours_where_there_are_many(tmp_path):
    names = [f"class {k}" for k in range(25)]
    sheets = [draw_boxes(torch.tensor([[k, 0.1, 0.1, 0.9, 0.9]]), [""] * 25, 100) for k in (3, 13)]
    assert sheets[0].getpixel((10, 50)) == sheets[1].getpixel((10, 50))
    assert draw_boxes(torch.tensor([[24, 0, 0, 1, 1.0]]), names, 64).size == (64, 64)


def test_classes_are_those_listed_or_those_in_use(tmp_path):
    _paint(tmp_path, "b.png", (40, 40), (2, 2, 20, 20))
    _paint(tmp_path, "a.png", (40, 40), (2, 2, 20, 20))
    (tmp_path / "a.json").write_text(json.dumps([{"class": "ant", "box": [0, 0, 1, 1]}, CAT, CAT]))
    images = FolderImages(tmp_path, 32)
    boxes, names = folder_boxes(images, tmp_path)
    assert names == ["ant", "cat"]
    assert boxes[..., 0].tolist() == [[0, 1, 1], [1, -1, -1]]  # in the order of the images' names
    (tmp_path / "classes.json").write_text(json.dumps(["cat", "dog", "ant"]))
    boxes, names = folder_boxes(images, tmp_path)
    assert names == ["cat", "dog", "ant"]
    assert boxes[..., 0].tolist() == [[2, 0, 0], [0, -1, -1]]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("a.json", None, "1 of 1 images have no layout, the first of them .*a.json"),
        ("a.json", "[", r"a\.json is no JSON"),
        ("a.json", [{"class": "cat", "box": [0, 0, 2, 1]}], r"a\.json: the box \(0, 0, 2, 1\) leaves the image"),
        ("a.json", [{"class": 0, "box": [0, 0, 1, 1]}], r"no box in .* names its class; .* classes\.json"),
        ("a.json", [[CAT], [CAT]], r"a\.json holds a list of layouts, but belongs to one image"),
        ("classes.json", {"cat": 0}, r"classes\.json must be a list of class names"),
        ("classes.json", ["dog"], r"a\.json: box class 'cat' is not known: choose one of dog"),
    ],
)
def test_bad_folders_get_a_sentence(tmp_path, file, content, words):
    _paint(tmp_path, "a.png", (40, 40), (2, 2, 20, 20))
    images = FolderImages(tmp_path, 32)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=words):
        folder_boxes(images, tmp_path)


def test_mirrored_boxes_belong_to_the_mirrored_picture():
    boxes = torch.tensor([[[1, 0.25, 0, 0.5, 0.75], [-1, 0, 0, 0, 0]]])
    assert mirrored(boxes).tolist() == [[[1, 0.5, 0, 0.75, 0.75], [-1, 0, 0, 0, 0]]]
    assert torch.equal(mirrored(mirrored(boxes)), boxes)


def test_frames_lie_on_the_edges_of_their_boxes():
    boxes = as_boxes([CAT, BEAR], NAMES, 3)
    sheet = np.array(draw_boxes(boxes, NAMES, 80))
    white = (sheet == 255).all(axis=2)
    assert not white[0, 20:40].any()  # the cat's upper edge
    assert not white[0:60, 20].any()
    assert not white[79].any()  # the bear's lower edge
    assert white[0:40, :20].all()
    assert white[0:40, 40:].all()
    assert not np.array_equal(sheet[0, 25], sheet[79, 60])  # a colour for each class
    picture = Image.new("RGB", (8, 8), (10, 20, 30))
    over = np.array(draw_boxes(boxes[:1], NAMES, 80, picture))
    assert (over[70, 70] == (10, 20, 30)).all()
    assert (over[50, 30] == (10, 20, 30)).all()  # a frame, not a tint
    assert not (over[0, 30] == (10, 20, 30)).all()
