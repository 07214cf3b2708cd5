"""Tar archives written by tarfile and by webdataset, indexed and read back; damaged ones lose what they say they do."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from lfm_fast.data import open_images
from lfm_fast.data.archive import Archive
from lfm_fast.data.opening import open_store
from lfm_fast.data.reading import UnusableImage
from lfm_fast.data.tar_index import index_tar
from lfm_fast.data.tar_store import expanded

GENERATOR = np.random.default_rng(0)


def picture(side=20):
    return GENERATOR.integers(0, 256, (side, side, 3)).astype(np.uint8)


def encoded(pixels, kind="png"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def pack(path, files, format=tarfile.GNU_FORMAT):
    """A tar of [(name, bytes)]."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def labelled(count, shift=0):
    """[(name, bytes)] of samples with a label each, and their pictures."""
    pictures = [picture() for _ in range(count)]
    files = []
    for k, pixels in enumerate(pictures):
        files += [(f"{k:04d}.png", encoded(pixels)), (f"{k:04d}.cls", b"%d" % ((k + shift) % 3))]
    return files, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


# -- the index is tarfile's


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_and_contents_in_every_format(tmp_path, format):
    lengths = (0, 1, 511, 512, 513, 20_000)
    names = ["plain", "folder/of/files.jpg", "d/" * 40 + "x" * 60 + ".png", "ümlaut.jpg"]
    if format != tarfile.USTAR_FORMAT:
        names += ["long/" * 60 + "name.png", "y" * 300]
    files = [(f"{k}{name}", bytes([k]) * lengths[k % len(lengths)]) for k, name in enumerate(names * 3)]
    path = pack(tmp_path / "a.tar", files, format)
    archive = Archive(path)
    index = index_tar(archive)
    assert [(name, archive.read(offset, size)) for name, offset, size in index.files] == files
    with tarfile.open(path) as tar:
        assert [(name, offset) for name, offset, _ in index.files] == [(m.name, m.offset_data) for m in tar]
    assert index.skipped == []


def test_folders_are_passed_over_and_links_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/l", tarfile.SYMTYPE), ("d/h", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "d/x" * 60
            tar.addfile(member)
        tar.addfile(tarfile.TarInfo("d/x"), io.BytesIO())
    index = index_tar(Archive(tmp_path / "a.tar"))
    assert index.files[0][0] == "d/x"
    assert [name for name, _ in index.skipped] == ["a.tar/d/l", "a.tar/d/h"]


def test_a_size_beyond_octal_digits_is_read(tmp_path):
    """Eight gigabytes and more, as GNU's base 256 and as a pax record: the archive is then cut off, at this size."""
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        member = tarfile.TarInfo("large")
        member.size = 9 << 30
        path = tmp_path / f"{format}.tar"
        path.write_bytes(member.tobuf(format) + bytes(1024))
        index = index_tar(Archive(path))
        assert index.files == []
        assert "it is cut off" in index.skipped[0][1]


# -- samples


def test_a_shard_written_by_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pictures = [picture() for _ in range(5)]
    with webdataset.TarWriter(str(tmp_path / "shard-000000.tar")) as writer:
        for k, pixels in enumerate(pictures):
            writer.write({"__key__": f"sample{k:03d}", "png": pixels, "cls": 2 * k, "json": {"width": 20}})
    images = open_images(tmp_path, 20)
    assert images.names == [f"shard-000000.tar/sample{k:03d}.png" for k in range(5)]
    assert images.labels.tolist() == [0, 2, 4, 6, 8]
    assert images.num_classes == 9
    assert torch.equal(images.batch(range(5)), torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2))


def test_shards_are_in_order_of_name_whatever_way_they_are_given(tmp_path):
    parts = []
    for k in (2, 0, 1):
        files, pictures = labelled(3, k)
        pack(tmp_path / f"part-{k:02d}.tar", files)
        parts.append((k, pictures))
    together = torch.cat([pictures for _, pictures in sorted(parts, key=lambda part: part[0])])
    for given in (tmp_path, tmp_path / "part-{00..02}.tar"):
        images = open_images(given, 20)
        assert torch.equal(images.batch(range(9)), together)
        assert images.labels.tolist() == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert len(open_images(tmp_path / "part-01.tar", 20)) == 3
    assert torch.equal(open_images(tmp_path / "part-{01..01}.tar", 20).batch(range(3)), together[3:6])


@pytest.mark.parametrize(
    ("extension", "content", "label"),
    [
        ("cls", b"7\n", 7),
        ("cls.txt", b"7", 7),
        ("json", b'{"label": 7, "width": 9}', 7),
        ("json", b'{"cls": 7}', 7),
        ("json", b'{"class_id": "7"}', 7),
        ("json", b'{"class": 3, "class_id": 2, "cls": 1, "label": 7}', 7),
        ("CLS", b"7", 7),
    ],
)
def test_labels_in_every_form(tmp_path, extension, content, label):
    path = pack(tmp_path / "a.tar", [("x.jpg", encoded(picture(), "jpeg")), (f"x.{extension}", content)])
    assert open_images(path, 16).labels.tolist() == [label]


def test_without_labels_they_are_one_class(tmp_path):
    caption = json.dumps({"caption": "a bird"}).encode()
    path = pack(tmp_path / "a.tar", [("x.jpg", encoded(picture(), "jpeg")), ("x.json", caption), ("x.txt", b"a bird")])
    images = open_images(path, 16)
    assert (images.class_names, images.labels.tolist()) == (["all"], [0])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"-1", "no number"),
        (b"cat", "no number"),
        (b"", "no number"),
        (b"1.5", "no number"),
        (b"1000000", "no number up to 999999"),
        ("\u0661".encode(), "no number"),  # a digit, but in another alphabet
        (None, "it has no label, as others have"),
    ],
)
def test_a_sample_without_a_good_label_is_skipped_and_named(tmp_path, content, says):
    files, pictures = labelled(3)
    files = [file for file in files if file[0] != "0001.cls"] + ([("0001.cls", content)] if content is not None else [])
    images = open_images(pack(tmp_path / "a.tar", files), 20)
    assert images.labels.tolist() == [0, 2]
    assert torch.equal(images.batch([0, 1]), pictures[[0, 2]])
    ((name, reason),) = images.report.skipped
    assert name == "a.tar/0001.png"
    assert says in reason


LARGE, ARABIC = b'{"label": 1000000}', '{"label": "\u0661"}'.encode()


@pytest.mark.parametrize(
    "content",
    [b"{", b'{"label": [1]}', b'{"label": 1.0}', b'{"label": true}', b"[" * 100_000, b'{"label": -1}', LARGE, ARABIC],
)
def test_a_label_file_that_is_damaged_costs_its_sample_alone(tmp_path, content):
    files, _ = labelled(2)
    path = pack(tmp_path / "a.tar", [*files, ("x.png", encoded(picture())), ("x.json", content)])
    images = open_images(path, 20)
    assert images.labels.tolist() == [0, 1]
    assert "its label" in dict(images.report.skipped)["a.tar/x.png"]


def test_names_of_classes_beside_the_archives_or_above_them(tmp_path):
    (tmp_path / "set").mkdir()
    path, beside = pack(tmp_path / "set" / "a.tar", labelled(3)[0]), tmp_path / "set" / "classnames.txt"
    (tmp_path / "classnames.txt").write_text("1\n2\n3\n")
    assert open_images(path, 16).class_names == ["1", "2", "3"]
    beside.write_text("cat\ndog\n\nhen\n")
    assert open_images(path, 16).class_names == ["cat", "dog", "hen"]
    beside.write_text("cat\ndog\n")
    with pytest.raises(ValueError, match="has 2 names, but there are labels up to 2"):
        open_images(path, 16)


def test_splits_are_in_the_names(tmp_path):
    for name in ("birds-train-000000.tar", "birds-train-000001.tar", "birds-validation-000000.tar"):
        pack(tmp_path / name, labelled(2)[0])
    assert len(open_images(tmp_path, 16)) == 4
    assert len(open_images(tmp_path, 16, split="held_out")) == 2
    assert len(open_images(tmp_path, 16, split="all")) == 6
    names = {split: open_store(tmp_path, split=split).name for split in ("train", "held_out", "all")}
    assert names == {split: f"{tmp_path.name} {split}" for split in names}  # notes and caches are kept by it
    pack(tmp_path / "birds.tar", labelled(3)[0])  # says nothing: it is not held out
    assert len(open_images(tmp_path, 16)) == 7
    with pytest.raises(ValueError, match="is used whole"):
        open_images(tmp_path / "birds-train-000000.tar", 16, split="held_out")


def test_several_pictures_of_a_sample(tmp_path):
    one, two = picture(), picture()
    path = pack(
        tmp_path / "a.tar", [("x.png", encoded(one)), ("x.mask.png", encoded(two)), ("y.mask.png", encoded(two))]
    )
    images = open_images(path, 20)
    assert images.names == ["a.tar/x.png", "a.tar/y.mask.png"]
    assert torch.equal(images.load(0), torch.from_numpy(one).permute(2, 0, 1))
    path = pack(tmp_path / "b.tar", [("x.png", encoded(one)), ("x.jpg", encoded(two, "jpeg")), ("y.png", encoded(one))])
    assert open_images(path, 20).report.skipped == [("b.tar/x", "it has several pictures (png, jpg)")]


def test_a_name_that_comes_twice_counts_once_and_is_named(tmp_path):
    one, two = picture(), picture()
    images = open_images(pack(tmp_path / "a.tar", [("x.png", encoded(one)), ("x.png", encoded(two))]), 20)
    assert len(images) == 1
    assert torch.equal(images.load(0), torch.from_numpy(one).permute(2, 0, 1))
    assert images.report.skipped == [("a.tar/x.png", "another file of this name is before it")]
    path = pack(tmp_path / "b.tar", [("x.png", encoded(one)), ("x.PNG", encoded(two))])  # of either case
    assert open_images(path, 20).report.skipped == [("b.tar/x.PNG", "another file of this name is before it")]


# -- faults


def test_the_index_is_made_once_and_anew_when_the_archive_changes(tmp_path, monkeypatch):
    path = pack(tmp_path / "a.tar", labelled(2)[0])
    first = open_store(path)
    with monkeypatch.context() as patch:
        patch.setattr("lfm_fast.data.tar_store.index_tar", lambda archive: pytest.fail("it was indexed again"))
        assert open_store(path).names == first.names
    pack(path, labelled(5)[0])
    assert len(open_store(path)) == 5
    with pytest.raises(UnusableImage, match="its archive has changed"):
        first.read(0)
    path.unlink()
    with pytest.raises(UnusableImage, match="its archive cannot be read"):
        first.read(0)
    assert first.key(0) is None


def test_a_cut_archive_gives_what_is_before_the_cut(tmp_path):
    files, pictures = labelled(6)
    path = pack(tmp_path / "a.tar", files)
    whole = path.read_bytes()
    content = Archive(path)
    places = {name: (offset, size) for name, offset, size in index_tar(content).files}
    for kept in (600, len(whole) // 3, places["0003.png"][0] + 40, places["0004.cls"][0] - 512, len(whole) - 10_240):
        path.write_bytes(whole[:kept])
        there = [k for k in range(6) if sum(places[f"{k:04d}.cls"]) <= kept]
        if not there:
            with pytest.raises(ValueError, match="holds no picture in its 1 tar archives"):
                open_store(path)
            continue
        images = open_images(path, 20)
        assert images.labels.tolist() == [k % 3 for k in there]
        assert torch.equal(images.batch(range(len(there))), pictures[there])
        assert any("what follows is lost" in reason for _, reason in images.report.skipped)


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path):
    path = pack(tmp_path / "a.tar", labelled(6)[0])
    place = next(offset for name, offset, _ in index_tar(Archive(path)).files if name == "0003.png") - 512
    data = bytearray(path.read_bytes())
    data[place + 10] ^= 1
    path.write_bytes(data)
    images = open_images(path, 20)
    assert images.labels.tolist() == [0, 1, 2]
    assert images.report.skipped == [("a.tar", f"from byte {place} on it is damaged; what follows is lost")]


def test_an_archive_behind_an_archive_is_not_passed_over(tmp_path):
    one, two = pack(tmp_path / "a.tar", labelled(1)[0]), pack(tmp_path / "b.tar", labelled(2)[0])
    one.write_bytes(one.read_bytes() + two.read_bytes())
    ((_, reason),) = open_images(one, 20).report.skipped
    assert "there is more behind the end mark" in reason


def test_what_is_no_archive_of_pictures_is_a_sentence(tmp_path):
    for name, content, says in (
        ("empty.tar", b"", "no tar archive"),
        ("text.tar", b"hello" * 1000, "no tar archive"),
        ("zeros.tar", bytes(10_240), "holds no picture"),
        ("gzip.tar", b"\x1f\x8b" + bytes(range(200)) * 10, "unpack it to .tar"),
        ("notes.tar", pack(tmp_path / "notes.tar", [("x.txt", b"hello")]).read_bytes(), "holds no picture"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=says):
            open_store(tmp_path / name)
    with pytest.raises(ValueError, match="cannot be opened"):
        open_store(tmp_path / "part-{0..3}.tar")
    for pattern in ("part-{3..0}.tar", "part-{0..1000000}.tar"):  # a million and one would be a slip of the finger
        with pytest.raises(ValueError, match="stands for no archives"):
            expanded(tmp_path / pattern)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.tar of split 'train'"):
        open_store(tmp_path / "none", "webdataset")


def test_a_label_of_a_megabyte_is_not_read(tmp_path):
    files = [("x.png", encoded(picture())), ("x.cls", b"1" + b" " * (1 << 20)), *labelled(1)[0]]
    assert open_store(pack(tmp_path / "a.tar", files)).skipped == [("a.tar/x.png", "its label has 1048577 bytes")]


def test_a_header_that_promises_much_takes_no_memory(tmp_path):
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        member = tarfile.TarInfo("x")
        member.type, member.size = kind, 1 << 40
        (tmp_path / "a.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
        with pytest.raises(ValueError, match="cut off"):
            open_store(tmp_path / "a.tar")
