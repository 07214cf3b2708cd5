"""What lies at a path is seen by its names, and the same pictures are the same latents in whatever form they lie."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lfm_fast.cli import main
from lfm_fast.data import open_images
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.opening import LAYOUTS, held_out_split, layout_of, open_store, palette_of
from lfm_fast.train.config import parse_args


def draw(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(path)


def test_a_folder_of_images_stays_one_whatever_its_classes_are_called(tmp_path):
    for name in ("train", "val", "images", "annotations", "cats.tar", "x_lmdb", "data_batch_1"):
        draw(tmp_path / name / "1.png")
    (tmp_path / "notes.tar").write_bytes(b"")
    assert layout_of(tmp_path) == "folder"
    assert len(open_images(tmp_path, 16)) == 7
    assert layout_of(tmp_path / "nowhere") == "folder"
    assert open_images(tmp_path / "cats.tar", 16, layout="folder").names == ["1.png"]


def test_what_each_layout_looks_like(tmp_path):
    for name in ("images/training/a.jpg", "annotations/training/a.png"):
        draw(tmp_path / "ade" / name)
    draw(tmp_path / "coco" / "images" / "val2017" / "1.jpg")
    draw(tmp_path / "imagenet" / "train" / "n01440764" / "1.png")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "a.tar").touch()
    (tmp_path / "cifar" / "cifar-10-batches-py").mkdir(parents=True)
    (tmp_path / "cifar" / "cifar-10-batches-py" / "data_batch_1").touch()
    (tmp_path / "bedroom_train_lmdb").mkdir()
    (tmp_path / "bedroom_train_lmdb" / "data.mdb").touch()
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "data.mdb").touch()
    seen = {path: layout_of(tmp_path / path) for path in ("ade", "coco", "imagenet", "tars", "cifar", "env")}
    expected = {"ade": "ade20k", "coco": "coco-stuff", "tars": "webdataset", "cifar": "cifar10", "env": "lmdb"}
    assert seen == expected | {"imagenet": "imagenet"}
    assert layout_of(tmp_path / "bedroom_train_lmdb") == layout_of(tmp_path) == "lsun"
    (tmp_path / "cats.txt").mkdir()
    lists = {name: layout_of(tmp_path / name) for name in ("a.txt", "a.lst", "a.list", "a.tsv", "cats.txt")}
    assert lists == dict.fromkeys(lists, "list") | {"cats.txt": "folder"}
    palettes = {path: palette_of(tmp_path / path, "auto") for path in ("ade", "coco", "imagenet")}
    assert palettes == {"ade": "ade20k", "coco": "coco-stuff", "imagenet": None}


def test_a_folder_that_may_not_be_listed_is_said_by_who_reads_it(tmp_path, monkeypatch):
    def refused(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("lfm_fast.data.opening.first_names", refused)
    assert layout_of(tmp_path) == "folder"


def test_what_is_held_out_is_evaluated_with(tmp_path):
    draw(tmp_path / "imagenet" / "val" / "n01440764" / "1.png")
    (tmp_path / "nvae" / "validation.lmdb").mkdir(parents=True)
    (tmp_path / "nvae" / "validation.lmdb" / "data.mdb").touch()
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "data.mdb").touch()
    for name in ("shards/birds-train-00.tar", "split/birds-train-00.tar", "split/birds-val-00.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    whole = ("lone", "shards", "a.txt", "a.tar", "none")
    assert {held_out_split(tmp_path / name) for name in whole} == {"train"}
    assert {held_out_split(tmp_path / name) for name in ("imagenet", "nvae", "split")} == {"held_out"}


def test_names_that_are_not_known_are_refused(tmp_path):
    draw(tmp_path / "1.png")
    with pytest.raises(ValueError, match="layout='tfrecord' is not known: choose 'auto' or one of folder, list, lsun"):
        open_images(tmp_path, 16, layout="tfrecord")
    with pytest.raises(ValueError, match="split='test' is not known"):
        open_images(tmp_path, 16, split="test")
    with pytest.raises(ValueError, match="compat='dit' is not known"):
        open_images(tmp_path, 16, compat="dit")
    with pytest.raises(ValueError, match="layout='lmdb', but 'embedded' is a set of its own"):
        open_images("embedded", 16, layout="lmdb")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_says_what_is_missing(tmp_path, layout):
    with pytest.raises(ValueError, match=str(tmp_path)) as refused:
        open_store(tmp_path, layout)
    assert str(refused.value).count("\n") == 0


# -- commands


@pytest.fixture
def forms(tmp_path):
    """Four pictures in two classes as a folder, an archive, a list and an environment: {layout: path}."""
    lmdb = pytest.importorskip("lmdb")
    generator = np.random.default_rng(0)
    folder, members = tmp_path / "folder", []
    with lmdb.open(str(tmp_path / "lmdb"), map_size=1 << 24) as environment, environment.begin(write=True) as writes:
        for k in range(4):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(file, "PNG")
            (folder / str(k // 2)).mkdir(parents=True, exist_ok=True)
            (folder / str(k // 2) / f"{k}.png").write_bytes(file.getvalue())
            members += [(f"{k}.png", file.getvalue()), (f"{k}.cls", b"%d" % (k // 2))]
            writes.put(b"%d" % k, file.getvalue())
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "list.txt").write_text("".join(f"folder/{k // 2}/{k}.png {k // 2}\n" for k in range(4)))
    paths = {"folder": folder, "webdataset": tmp_path / "shard.tar", "list": tmp_path / "list.txt"}
    return paths | {"lmdb": tmp_path / "lmdb"}


@pytest.mark.filterwarnings("ignore:Latent channels")  # noise is no picture that the autoencoder knows
def test_the_same_pictures_are_the_same_latents_from_every_layout(forms, tmp_path):
    caches = {}
    for layout, path in forms.items():
        command = ["encode", "--data", str(path), "--from", layout, "--image-size", "32", "--autoencoder", "embedded"]
        assert main([*command, "--output", str(tmp_path / f"cache-{layout}")]) == 0
        caches[layout] = LatentCache.open(tmp_path / f"cache-{layout}")
    means = {layout: cache.read(torch.arange(4))[0] for layout, cache in caches.items()}
    assert all(torch.equal(mean, means["folder"]) for mean in means.values())
    assert len(means["folder"].flatten(1).unique(dim=0)) == 4
    labels = {layout: cache.labels.tolist() for layout, cache in caches.items()}
    assert labels == {key: [0, 0, 1, 1] for key in ("folder", "webdataset", "list")} | {"lmdb": [0, 0, 0, 0]}


@pytest.mark.parametrize("decoder", ["pil", "dali"])
def test_both_decoders_read_every_layout(forms, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    batches = {layout: open_images(path, 24, decoder=decoder).batch([3, 0, 2]) for layout, path in forms.items()}
    assert all(torch.equal(batch, batches["folder"]) for batch in batches.values())
    assert len(batches["folder"].flatten(1).unique(dim=0)) == 3


@pytest.mark.filterwarnings("ignore:Latent channels")
def test_a_split_and_the_first_of_lsun_are_encoded_by_flags(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    monkeypatch.setattr("lfm_fast.data.opening.FIRST_OF_LSUN", 3)
    for name, count in (("bedroom_train_lmdb", 5), ("bedroom_val_lmdb", 2)):
        with lmdb.open(str(tmp_path / name), map_size=1 << 24) as environment, environment.begin(write=True) as writes:
            for k in range(count):
                file = io.BytesIO()
                Image.new("RGB", (16, 16), (40 * k, 99, 0)).save(file, "PNG")
                writes.put(b"%040x" % k, file.getvalue())
    counts = []
    for flags in ([], ["--split", "held_out"], ["--split", "all"], ["--compat", "lfm"]):
        output = tmp_path / "-".join(["cache", *flags])
        command = ["encode", "--data", str(tmp_path), "--image-size", "16", "--autoencoder", "embedded", *flags]
        assert main([*command, "--output", str(output)]) == 0
        counts.append(LatentCache.open(output).num_items)
    assert counts == [5, 2, 7, 3]


def test_training_takes_the_flag():
    assert parse_args(["--data", "x", "--from", "lmdb-raw"]).layout == "lmdb-raw"
    assert parse_args(["--data", "x"]).layout is None
    with pytest.raises(SystemExit):
        parse_args(["--data", "x", "--from", "tfrecord"])
