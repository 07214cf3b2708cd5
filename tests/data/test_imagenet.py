"""ImageNet's folders, with val in every form it is found in."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from lfm_fast.data import open_images
from lfm_fast.data.opening import layout_of, open_store

WNIDS = ["n01440764", "n01443537", "n02119789"]
OF_VAL = [2, 0, 1, 2, 0]  # the class of each image, in order of name


def draw(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20), (level,) * 3).save(path, "JPEG")


@pytest.fixture
def imagenet(tmp_path):
    """Images whose level of grey is 50 times their class."""
    for label, wnid in enumerate(WNIDS):
        for k in range(2):
            draw(tmp_path / "train" / wnid / f"{wnid}_{k}.JPEG", 50 * label)
    for k, label in enumerate(OF_VAL, 1):
        draw(tmp_path / "val" / f"ILSVRC2012_val_{k:08d}.JPEG", 50 * label)
    return tmp_path


def in_class_folders(top):
    for path in sorted((top / "val").iterdir()):
        folder = top / "val" / WNIDS[OF_VAL[int(path.stem[-8:]) - 1]]
        folder.mkdir(exist_ok=True)
        path.rename(folder / path.name)


def listed_by_number(top):
    lines = [f"ILSVRC2012_val_{k:08d}.JPEG {label}" for k, label in enumerate(OF_VAL, 1)]
    (top / "val.txt").write_text("\n".join(reversed(lines)))


def listed_by_name(top):
    lines = [f"val/ILSVRC2012_val_{k:08d}.JPEG {WNIDS[label]}" for k, label in enumerate(OF_VAL, 1)]
    (top / "val_labels.txt").write_text("\n".join(lines))


def a_name_in_each_line(top):
    (top / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(WNIDS[label] for label in OF_VAL))


def kaggle(top):
    rows = [
        f"ILSVRC2012_val_{k:08d},{WNIDS[label]} 1 2 3 4 {WNIDS[label]} 5 6 7 8" for k, label in enumerate(OF_VAL, 1)
    ]
    (top / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "\n".join(reversed(rows)) + "\n")


def devkit(top):
    """Numbers of an order of their own, as the devkit's are, and classes that are no leaves behind them."""
    numbers = {"n02119789": 1, "n01440764": 2, "n01443537": 3, "n00000000": 1001}
    kind = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    table = np.array([(number, wnid, "a, b", 0) for wnid, number in numbers.items()], dtype=kind)
    folder = top / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    savemat(folder / "meta.mat", {"synsets": table.reshape(-1, 1)})
    text = "".join(f"{numbers[WNIDS[label]]}\n" for label in OF_VAL)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(text)


FORMS = (in_class_folders, listed_by_number, listed_by_name, a_name_in_each_line, kaggle, devkit)


def classes_seen(images):
    """By the pictures themselves."""
    return [round(int(picture[0, 0, 0]) / 50) for picture in images.batch(range(len(images)))]


def test_train_is_a_folder_for_each_class(imagenet):
    listed_by_number(imagenet)
    images = open_images(imagenet, 16)
    assert images.name == f"{imagenet.name} train"
    assert images.class_names == WNIDS
    assert images.labels.tolist() == classes_seen(images) == [0, 0, 1, 1, 2, 2]
    assert images.names[0] == "train/n01440764/n01440764_0.JPEG"


@pytest.mark.parametrize("form", FORMS)
def test_labels_of_val(imagenet, form):
    form(imagenet)
    images = open_images(imagenet, 16, split="held_out")
    assert images.class_names == WNIDS
    assert images.labels.tolist() == classes_seen(images)
    assert sorted(images.labels.tolist()) == sorted(OF_VAL)
    assert images.report.skipped == []
    assert len(open_images(imagenet, 16, split="all")) == 11


@pytest.mark.parametrize("form", [in_class_folders, listed_by_name, kaggle, devkit])
def test_val_alone_knows_its_classes_by_name(imagenet, form):
    form(imagenet)
    shutil.rmtree(imagenet / "train")
    images = open_images(imagenet, 16, layout="imagenet", split="held_out")
    assert images.class_names == WNIDS
    assert images.labels.tolist() == classes_seen(images)


def test_kaggles_folders_are_found_from_their_top(imagenet, tmp_path):
    top = tmp_path / "kaggle"
    (top / "ILSVRC/Data/CLS-LOC").mkdir(parents=True)
    for name in ("train", "val"):
        (imagenet / name).rename(top / "ILSVRC/Data/CLS-LOC" / name)
    kaggle(top)
    assert layout_of(top) == "imagenet"
    assert open_images(top, 16, split="held_out").labels.tolist() == OF_VAL


def test_an_image_without_a_label_is_skipped_and_named(imagenet):
    listed_by_number(imagenet)
    draw(imagenet / "val" / "ILSVRC2012_val_00000099.JPEG", 0)
    images = open_images(imagenet, 16, split="held_out")
    assert images.labels.tolist() == OF_VAL
    assert images.report.skipped == [("val/ILSVRC2012_val_00000099.JPEG", "val.txt has no label for it")]


@pytest.mark.parametrize("form", [listed_by_number, a_name_in_each_line, kaggle, devkit])
def test_an_image_that_has_a_label_but_is_gone_is_named(imagenet, form):
    form(imagenet)
    (imagenet / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    images = open_images(imagenet, 16, split="held_out")
    assert images.labels.tolist() == classes_seen(images) == [2, 1, 2, 0]
    ((name, reason),) = images.report.skipped
    assert name == "val/ILSVRC2012_val_00000002.JPEG"
    assert "has a label for it, but it is not there" in reason


def test_labels_that_do_not_fit_are_refused(imagenet):
    with pytest.raises(ValueError, match=r"val has no sub-folders, and no file of labels is beside it; give val\.txt"):
        open_store(imagenet, split="held_out")
    (imagenet / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 3\n")
    with pytest.raises(ValueError, match="is 3, but there are 3 classes"):
        open_store(imagenet, split="held_out")
    (imagenet / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 1\nval/ILSVRC2012_val_00000001.JPEG 2\n")
    with pytest.raises(ValueError, match=r"gives ILSVRC2012_val_00000001\.JPEG 2 in line 2, 1 above"):
        open_store(imagenet, split="held_out")
    (imagenet / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG n99999999\n")
    with pytest.raises(ValueError, match=r"is 'n99999999', which is no folder of train"):
        open_store(imagenet, split="held_out")
    (imagenet / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 10000000000\n")
    with pytest.raises(ValueError, match=r"val\.txt, line 1: its label '10000000000' is no number"):
        open_store(imagenet, split="held_out")
    (imagenet / "val.txt").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        open_store(imagenet, split="held_out")
    (imagenet / "val.txt").unlink()
    (imagenet / "LOC_val_solution.csv").write_text("Image,Prediction\na,b\n")
    with pytest.raises(ValueError, match="no columns ImageId and PredictionString"):
        open_store(imagenet, split="held_out")


@pytest.mark.parametrize("place", ["devkit/data", "data", "."])
def test_where_the_devkit_may_lie(imagenet, place):
    devkit(imagenet)
    whole = imagenet / "ILSVRC2012_devkit_t12" / "data"
    (imagenet / place).mkdir(parents=True, exist_ok=True)
    for path in list(whole.iterdir()):
        path.rename(imagenet / place / path.name)
    assert open_store(imagenet, split="held_out").labels == OF_VAL


def test_a_table_of_the_devkit_that_is_far_too_large_is_not_read(imagenet):
    devkit(imagenet)
    os.truncate(imagenet / "ILSVRC2012_devkit_t12" / "data" / "meta.mat", (8 << 20) + 1)
    with pytest.raises(ValueError, match=r"meta\.mat is not .* \(it has 8388609 bytes\)"):
        open_store(imagenet, split="held_out")


def test_a_name_with_spaces(imagenet):
    for path in sorted((imagenet / "val").iterdir()):
        path.rename(path.with_name(path.name.replace("_", " ")))
    listed_by_number(imagenet)
    (imagenet / "val.txt").write_text((imagenet / "val.txt").read_text().replace("_", " "))
    assert open_store(imagenet, split="held_out").labels == OF_VAL


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0 MAT-file" + bytes(2000), b"\xff" * 300, None])
def test_a_damaged_table_of_the_devkit_is_a_sentence(imagenet, content):
    devkit(imagenet)
    table = imagenet / "ILSVRC2012_devkit_t12" / "data" / "meta.mat"
    table.unlink() if content is None else table.write_bytes(content)
    with pytest.raises(ValueError, match=r"meta\.mat is not the devkit's table of classes"):
        open_store(imagenet, split="held_out")


def test_a_number_that_the_devkit_does_not_know_is_a_sentence(imagenet):
    devkit(imagenet)
    path = imagenet / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("1\n7\n")
    with pytest.raises(ValueError, match="line 2: '7' is no number of a class"):
        open_store(imagenet, split="held_out")


def test_a_missing_folder_is_a_sentence(imagenet):
    shutil.rmtree(imagenet / "val")
    assert len(open_store(imagenet)) == 6
    with pytest.raises(ValueError, match="has no folder val, which ImageNet's split='all' is"):
        open_store(imagenet, split="all")
    with pytest.raises(ValueError, match="has no folder train"):
        open_store(imagenet / "train", "imagenet")


def test_labels_above_the_folder_and_which_list_counts(tmp_path):
    """val.txt is asked for first, in the folder, above it, and then the other names."""
    for number, name in enumerate(WNIDS):
        draw(tmp_path / "set" / "train" / name / "1.JPEG", 0)
        draw(tmp_path / "set" / "val" / f"{number}.JPEG", 0)
    for path, order in (("val.txt", (2, 0, 1)), ("set/val_map.txt", (1, 1, 1))):
        (tmp_path / path).write_text("".join(f"{k}.JPEG {label}\n" for k, label in enumerate(order)))
    assert open_store(tmp_path / "set", "imagenet", "held_out").labels == [2, 0, 1]


def test_a_class_may_be_called_all(tmp_path):
    for name in ("train/all", "train/n01440764", "val/all"):
        draw(tmp_path / name / "1.JPEG", 0)
    store = open_store(tmp_path, "imagenet", "held_out")
    assert (store.names, store.labels, store.class_names) == (["val/all/1.JPEG"], [0], ["all", "n01440764"])
