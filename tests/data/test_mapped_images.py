import numpy as np
import pytest
import torch
from PIL import Image

from lfm_fast.data import label_maps, mapped_images, open_images
from lfm_fast.data.mapped_images import MappedImages


@pytest.fixture
def photos(tmp_path):
    """Five images in two classes and their maps, of which one is missing: the image is its map in grey."""
    for number, name in enumerate(("a/0", "a/1", "b/0", "b/1", "b/2")):
        ids = torch.randint(19, (20 + number, 24), generator=torch.Generator().manual_seed(number))
        for folder in ("images", "maps"):
            (tmp_path / folder / name[0]).mkdir(parents=True, exist_ok=True)
        pixels = Image.fromarray((ids * 13).numpy().astype(np.uint8)).convert("RGB")
        pixels.save(tmp_path / "images" / f"{name}.png")
        if name != "b/0":
            label_maps.write_label_map(tmp_path / "maps" / f"{name}.png", ids, "celebamask-hq")
    return tmp_path


def opened(photos, size=16):
    return MappedImages(open_images(photos / "images", size), "celebamask-hq", photos / "maps")


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_folder_of_images_and_maps(photos, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(mapped_images, "_IN_MEMORY", 0)
    images = opened(photos)
    assert images.names == ["a/0.png", "a/1.png", "b/1.png", "b/2.png"]
    assert images.report.skipped == [("b/0.png", "it has no label map")]
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert images.decoded_by == "auto"
    images.check_maps()
    maps = images.label_maps([2, 0, 2])
    assert maps.shape == (3, 16, 16)
    assert maps.dtype == torch.int64
    whole = label_maps.read_label_map(photos / "maps" / "b/1.png", "celebamask-hq")
    assert torch.equal(maps[0], label_maps.centre_square(whole, 16))
    assert torch.equal(maps[0], maps[2])
    assert torch.equal(images.batch([2])[0], open_images(photos / "images", 16).load(3))
    assert torch.equal(images.load(2), images.batch([2])[0])


def test_an_image_without_a_map_shifts_no_label_and_maps_are_kept_where_they_fit(photos, monkeypatch):
    (photos / "maps" / "b" / "1.png").unlink()
    (photos / "maps" / "a" / "0.png").unlink()
    for most, kept in ((2 * 16 * 16, True), (2 * 16 * 16 - 1, False)):
        monkeypatch.setattr(mapped_images, "_IN_MEMORY", most)
        images = MappedImages(open_images(photos / "images", 16, flip=True), "celebamask-hq", photos / "maps")
        assert (images.names, images.labels.tolist(), images.flip) == (["a/1.png", "b/2.png"], [0, 1], True)
        images.label_maps([0])
        assert (images._maps is not None) is kept


@pytest.mark.parametrize("in_memory", [True, False])
def test_an_unknown_id_is_refused_before_training(photos, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(mapped_images, "_IN_MEMORY", 0)
    Image.fromarray(np.full((23, 24), 77, np.uint8)).save(photos / "maps" / "b/1.png")
    with pytest.raises(ValueError, match=r"b/1\.png: the value 77 at row 0, column 0 is no id of celebamask-hq"):
        opened(photos).check_maps()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_map_of_another_shape_than_its_image_is_refused(photos, monkeypatch, in_memory):
    """As where one of the two was turned: it would be cut elsewhere. A map of half the size is of the same shape."""
    if not in_memory:
        monkeypatch.setattr(mapped_images, "_IN_MEMORY", 0)
    for shape in ((12, 12), (24, 24), (11, 11)):  # the image has 23 rows and 24 columns
        Image.fromarray(np.zeros(shape, np.uint8)).save(photos / "maps" / "b/1.png")
        opened(photos).check_maps()
    Image.fromarray(np.zeros((46, 40), np.uint8)).save(photos / "maps" / "b/1.png")
    with pytest.raises(ValueError, match=r"b/1\.png has 40x46 pixels and its image 24x23; give them one shape"):
        opened(photos).check_maps()


def test_the_embedded_set_has_its_own_maps():
    images = open_images("embedded", 32, split="held_out")
    mapped = MappedImages(images, "embedded")
    rgba = torch.stack([images.rgba(i) for i in (5, 100)])
    assert torch.equal(mapped.label_maps([5, 100]), label_maps.of_embedded(rgba))
    assert len(mapped) == len(images)
    assert torch.equal(mapped.batch([5]), images.batch([5]))


def test_what_does_not_go_together_is_refused(photos, tmp_path):
    embedded, folder = open_images("embedded", 32, split="held_out"), open_images(photos / "images", 16)
    with pytest.raises(ValueError, match="palette is 'ade20k', but the label maps of the embedded set"):
        MappedImages(embedded, "ade20k")
    with pytest.raises(ValueError, match="leave the folder of maps out"):
        MappedImages(embedded, "embedded", photos / "maps")
    with pytest.raises(ValueError, match="comes without label maps; give the folder"):
        MappedImages(folder, "ade20k")
    (photos / "images").rename(photos / "embedded")
    with pytest.raises(ValueError, match="embedded comes without label maps"):
        MappedImages(open_images(photos / "embedded", 16), "embedded")
    (photos / "others").mkdir()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(photos / "others" / "x.png")
    with pytest.raises(ValueError, match="None of the 5 images has a label map of its name"):
        MappedImages(folder, "ade20k", photos / "others")
