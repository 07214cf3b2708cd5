"""CelebAMask-HQ, ADE20K and COCO-Stuff in small, as they are unpacked, with the label maps that came with them."""

import numpy as np
import pytest
import torch
from PIL import Image

from lfm_fast.data import mapped_sets, open_images
from lfm_fast.data.label_maps import centre_square
from lfm_fast.data.mapped_images import MappedImages
from lfm_fast.data.opening import layout_of, open_store, palette_of

GENERATOR = np.random.default_rng(0)
# by the data set's own description, in the order of its ids from 1
PARTS = ["skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear"]
PARTS += ["mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"]


def draw(path, side=40):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(GENERATOR.integers(0, 256, (side, side, 3)).astype(np.uint8)).save(path)


def write_mask(folder, number, part, mask):
    path = folder / "CelebAMask-HQ-mask-anno" / str(number // 2000) / f"{number:05d}_{part}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB").save(path)


@pytest.fixture
def celeba(tmp_path):
    """Images 0, 1, 2000, 26999, 27000 and 29999; each pixel's parts are drawn at random, half of them not at all."""
    maps = {}
    for number in (0, 1, 2000, 26_999, 27_000, 29_999):
        draw(tmp_path / "CelebA-HQ-img" / f"{number}.jpg")
        expected = np.zeros((20, 20), np.int64)  # half the image's size, as the masks are
        for k, part in enumerate(PARTS, 1):
            if GENERATOR.random() < 0.5 or part == "hair":
                mask = GENERATOR.random((20, 20)) < 0.2
                write_mask(tmp_path, number, part, mask)
                expected = np.where(mask, k, expected)
        maps[number] = torch.from_numpy(expected)
    return tmp_path, maps


def test_parts_lie_on_one_another_in_order_of_the_palette(celeba):
    path, maps = celeba
    assert layout_of(path) == "celebamask-hq"
    images = MappedImages(open_images(path, 16), "celebamask-hq")
    assert images.names == ["0.jpg", "1.jpg", "2000.jpg", "26999.jpg"]
    images.check_maps()
    expected = torch.stack([centre_square(maps[number], 16) for number in (0, 1, 2000, 26_999)])
    assert torch.equal(images.label_maps(range(4)), expected)
    assert len(expected.unique()) > 12


def test_the_last_three_thousand_are_held_out(celeba):
    path, maps = celeba
    images = MappedImages(open_images(path, 20, split="held_out"), "celebamask-hq")
    assert images.names == ["27000.jpg", "29999.jpg"]
    assert torch.equal(images.label_maps([1])[0], maps[29_999])
    assert len(open_images(path, 16, split="all")) == 6
    split = mapped_sets._SPLITS
    assert [len(range(30_000)[split[name]]) for name in ("train", "held_out", "all")] == [27_000, 3_000, 30_000]


def test_faults_of_masks(celeba):
    path, _ = celeba
    draw(path / "CelebA-HQ-img" / "5.jpg")
    images = MappedImages(open_images(path, 16), "celebamask-hq")
    assert images.report.skipped == [("5.jpg", "it has no mask of any part")]
    write_mask(path, 1, "hair", np.ones((30, 30)))
    with pytest.raises(ValueError, match=r"00001_hair\.png is of another size"):
        images.check_maps()
    mask = path / "CelebAMask-HQ-mask-anno" / "0" / "00001_hair.png"
    mask.write_bytes(mask.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"00001_hair\.png cannot be used: it is damaged"):
        images.check_maps()
    for each in mask.parent.glob("00001_*"):
        each.unlink()
    with pytest.raises(ValueError, match=r"The masks of image 1 in .* are gone"):
        images.label_maps([1])


def test_what_is_not_black_in_a_mask_is_of_the_part(celeba):
    path, _ = celeba
    mask = path / "CelebAMask-HQ-mask-anno" / "0" / "00001_cloth.png"
    Image.new("L", (20, 20), 1).save(mask)
    images = MappedImages(open_images(path, 20), "celebamask-hq")
    assert (images.label_maps([1]) == 18).all()


def test_a_cache_folder_that_cannot_be_written_costs_time_alone(celeba, monkeypatch):
    path, maps = celeba
    monkeypatch.setattr(mapped_sets, "note_folder", lambda kind, folder: path / "CelebA-HQ-img" / "0.jpg" / "none")
    images = MappedImages(open_images(path, 20), "celebamask-hq")
    assert torch.equal(images.label_maps([0])[0], maps[0])


def test_a_map_is_made_of_its_masks_once(celeba, monkeypatch):
    path, maps = celeba
    images = MappedImages(open_images(path, 20), "celebamask-hq")
    images.check_maps()
    read = []
    real = mapped_sets.open_unconverted
    monkeypatch.setattr(mapped_sets, "open_unconverted", lambda file: read.append(file.name) or real(file))
    again = MappedImages(open_images(path, 20), "celebamask-hq")
    assert torch.equal(again.label_maps([0, 1, 2, 3]), images.label_maps([0, 1, 2, 3]))
    assert read == []
    write_mask(path, 1, "hair", np.ones((20, 20)))
    changed = MappedImages(open_images(path, 20), "celebamask-hq").label_maps([1])[0]
    assert all(name.startswith("00001_") for name in read)
    assert set(changed.unique().tolist()) <= set(range(PARTS.index("hair") + 1, 19))
    for kept in images._source._kept.iterdir():
        kept.write_bytes(kept.read_bytes()[:60])  # damaged in the cache folder: it is made again
    assert torch.equal(MappedImages(open_images(path, 20), "celebamask-hq").label_maps([0])[0], maps[0])


def test_what_is_no_celebamask_is_a_sentence(celeba, tmp_path):
    path, _ = celeba
    (path / "CelebAMask-HQ-mask-anno").rename(path / "masks")
    with pytest.raises(ValueError, match=r"there is no folder .*CelebAMask-HQ-mask-anno"):
        open_store(path, "celebamask-hq")
    with pytest.raises(ValueError, match="has no folder CelebA-HQ-img"):
        open_store(path / "masks", "celebamask-hq")
    for each in (path / "CelebA-HQ-img").glob("2[79]*"):
        each.unlink()
    (path / "masks").rename(path / "CelebAMask-HQ-mask-anno")
    with pytest.raises(ValueError, match=r"no image of split='held_out', which has 27000\.jpg to 29999\.jpg"):
        open_store(path, split="held_out")


def write_map(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path)


def paired(tmp_path, images, maps, folders, values):
    """A picture and a map in each folder: {folder: the map's values}."""
    drawn = {}
    for folder, stem in folders.items():
        draw(tmp_path / images / folder / f"{stem}.jpg", 32)
        drawn[folder] = GENERATOR.choice(values, (32, 32))
        write_map(tmp_path / maps / folder / f"{stem}.png", drawn[folder])
    return drawn


def test_ade20k(tmp_path):
    """In its maps 0 is everything else, as in the palette."""
    folders = {"training": "ADE_train_00000001", "validation": "ADE_val_00000001"}
    drawn = paired(tmp_path, "images", "annotations", folders, range(151))
    assert layout_of(tmp_path) == "ade20k"
    for split, folder in (("train", "training"), ("held_out", "validation")):
        images = MappedImages(open_images(tmp_path, 32, split=split), "ade20k")
        assert images.names == [f"{folder}/{folders[folder]}.jpg"]
        assert torch.equal(images.label_maps([0])[0], torch.from_numpy(drawn[folder]))
    assert len(MappedImages(open_images(tmp_path, 32, split="all"), "ade20k")) == 2


@pytest.mark.parametrize("maps", ["annotations", "stuffthingmaps", "stuffthingmaps_trainval2017"])
@pytest.mark.parametrize("images_in", [".", "images"])
def test_coco_stuff(tmp_path, maps, images_in):
    """Its maps hold an id less one, and 255 where nothing was annotated."""
    folders = {"train2017": "000000000009", "val2017": "000000000139"}
    drawn = paired(tmp_path, images_in, maps, folders, [*range(182), 255])
    assert layout_of(tmp_path) == "coco-stuff"
    for split, folder in (("train", "train2017"), ("held_out", "val2017")):
        images = MappedImages(open_images(tmp_path, 32, split=split), "coco-stuff")
        expected = torch.from_numpy(np.where(drawn[folder] == 255, 0, drawn[folder] + 1))
        assert torch.equal(images.label_maps([0])[0], expected)
    assert len(MappedImages(open_images(tmp_path, 32, split="all"), "coco-stuff")) == 2


def test_images_without_their_maps_serve_where_none_are_needed(tmp_path):
    draw(tmp_path / "train2017" / "000000000009.jpg")
    images = open_images(tmp_path, 16)
    assert len(images) == 1
    with pytest.raises(ValueError, match="coco-stuff train comes without label maps; give the folder"):
        MappedImages(images, "coco-stuff")


def test_the_palette_is_the_datas(celeba):
    path, _ = celeba
    with pytest.raises(
        ValueError, match="palette is 'ade20k', but the maps of celebamask-hq train are of 'celebamask-hq'"
    ):
        MappedImages(open_images(path, 16), "ade20k")
    assert palette_of(path, "auto") == palette_of("anywhere", "celebamask-hq") == "celebamask-hq"
    assert palette_of(path / "CelebA-HQ-img", "auto") is None


def test_maps_of_another_folder_go_before_those_that_came_with_the_images(celeba, tmp_path):
    path, _ = celeba
    for name in ("0", "1"):
        write_map(tmp_path / "others" / f"{name}.png", np.full((40, 40), 7))
    images = MappedImages(open_images(path, 16), "celebamask-hq", tmp_path / "others")
    assert images.names == ["0.jpg", "1.jpg"]
    assert images.label_maps([0]).unique().tolist() == [7]
