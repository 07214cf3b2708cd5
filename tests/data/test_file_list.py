"""Text files that list images."""

import os

import pytest
from PIL import Image

from lfm_fast.data import open_images
from lfm_fast.data.opening import open_store


@pytest.fixture
def pictures(tmp_path):
    """Three images, each of one grey, whose level says which it is."""
    for level, name in enumerate(("a/1.png", "a/a dog.png", "b/3.png"), 1):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 20), (level,) * 3).save(tmp_path / name)
    return tmp_path


def listed(folder, text, name="images.txt"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def levels(images):
    return [int(picture[0, 0, 0]) for picture in images.batch(range(len(images)))]


def test_order_and_labels_are_the_lists(pictures):
    images = open_images(listed(pictures, "b/3.png 2\na/a dog.png 0\na/1.png 2\n"), 16)
    assert images.names == ["b/3.png", "a/a dog.png", "a/1.png"]
    assert images.labels.tolist() == [2, 0, 2]
    assert images.class_names == ["0", "1", "2"]
    assert levels(images) == [3, 2, 1]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
def test_without_labels_they_are_one_class(pictures, end):
    images = open_images(listed(pictures, "\ufeffa/1.png" + end + "a/a dog.png", "some.lst"), 16)
    assert (images.names, images.class_names) == (["a/1.png", "a/a dog.png"], ["all"])


def test_a_digit_of_another_alphabet_is_part_of_the_name(pictures):
    images = open_store(listed(pictures, "a/1.png\nb/3 \u0663\n"))
    assert (images.names, images.class_names) == (["a/1.png", "b/3 \u0663"], ["all"])


@pytest.mark.parametrize("text", ["a/1.png 0\nb/3.png\n", "a/1.png\nb/3.png 0\n"])
def test_labels_are_in_all_lines_or_in_none(pictures, text):
    with pytest.raises(ValueError, match=r"labels in some lines and none in others, as line 2"):
        open_store(listed(pictures, text))


def test_all_of_a_list_is_its_only_split(pictures):
    path = listed(pictures, "a/1.png\n")
    assert open_store(path, split="all").names == open_store(path, split="train").names == ["a/1.png"]
    with pytest.raises(ValueError, match="is used whole"):
        open_store(path, split="held_out")


def test_tabs_and_full_paths(pictures):
    images = open_images(listed(pictures, f"{pictures}/b/3.png\t1\na/1.png \t 0\n"), 16)
    assert levels(images) == [3, 1]
    assert images.labels.tolist() == [1, 0]


def test_another_suffix_by_name(pictures):
    path = listed(pictures, "a/1.png\n", "images")
    with pytest.raises(ValueError, match="is a file"):
        open_images(path, 16)
    assert len(open_images(path, 16, layout="list")) == 1


def test_names_that_are_no_utf8(pictures):
    name = os.path.join(os.fsencode(pictures), b"\xff.png")
    os.link(pictures / "b/3.png", name)
    assert levels(open_images(listed(pictures, b"\xff.png\n"), 16)) == [3]


def test_a_file_that_is_not_there_is_skipped_and_shifts_no_label(pictures):
    images = open_images(listed(pictures, "a/1.png 0\nnowhere.png 1\nb/3.png 2\n"), 16)
    assert images.labels.tolist() == [0, 2]
    assert levels(images) == [1, 3]
    assert images.report.skipped == [("nowhere.png", "it cannot be opened (No such file or directory)")]


def test_what_is_listed_again_is_left_out_and_named(pictures):
    images = open_images(listed(pictures, "a/1.png 0\nb/3.png 1\na/1.png 0\n"), 16)
    assert levels(images) == [1, 3]
    assert images.report.skipped == [("a/1.png", "it is listed again")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("a/1.png 0\na/1.png 1\n", "gives a/1.png label 1 in line 2, 0 above"),
        ("a/1.png 0\n\nb/3.png\n", r"labels in some lines and none in others, as line 3 \('b/3.png'\)"),
        ("a/1.png 1000000\n", "line 1: its label '1000000' is no number up to 999999"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "is no text"),
        (b"x" * 100_000, "is no text"),
    ],
)
def test_a_list_that_cannot_be_used_is_a_sentence(pictures, text, says):
    with pytest.raises(ValueError, match=says):
        open_store(listed(pictures, text))


def test_what_is_no_file_is_a_sentence(pictures):
    with pytest.raises(ValueError, match="cannot be read"):
        open_store(pictures / "nowhere.txt")
    with pytest.raises(ValueError, match="is not a regular file"):
        open_store(pictures / "a", "list")
    os.mkfifo(pictures / "pipe.txt")  # to open it would wait for a writer for ever
    with pytest.raises(ValueError, match="is not a regular file"):
        open_store(pictures / "pipe.txt")
    with pytest.raises(ValueError, match=r"split='held_out': .* is used whole"):
        open_store(listed(pictures, "a/1.png"), split="held_out")
