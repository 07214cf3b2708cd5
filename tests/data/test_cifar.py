"""CIFAR-10 in both published forms, and pickles that try something."""

import os
import pickle
import pickletools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_fast.data import open_images
from lfm_fast.data.opening import open_store
from lfm_fast.data.plain_pickle import Refused, read_plain_pickle

GENERATOR = np.random.default_rng(0)


def batch(count=4):
    """(pixels (count, 3072), labels) as the files hold them: the red plane, the green, the blue."""
    return GENERATOR.integers(0, 256, (count, 3072)).astype(np.uint8), GENERATOR.integers(0, 10, count).tolist()


def python_2_pickle(pixels, labels):
    """What Python 2's cPickle wrote in 2009: protocol 2, its strings, and NumPy's old module."""

    def short(text):
        return b"U" + bytes([len(text)]) + text

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85q\x04" + short(b"b") + b"\x87Rq\x06"
    )
    array += b"(K\x01" + b"M" + len(pixels).to_bytes(2, "little") + b"M\x00\x0c\x86q\x07"
    array += b"cnumpy\ndtype\nq\x08" + short(b"u1") + b"K\x00K\x01\x87Rq\x0a(K\x03" + short(b"|") + b"NNN"
    array += (
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + pixels.size.to_bytes(4, "little") + pixels.tobytes() + b"tb"
    )
    numbers = b"]q\x0b(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    names = b"](" + b"".join(short(b"a_s_%06d.png" % k) for k in range(len(labels))) + b"e"
    items = short(b"batch_label") + short(b"training batch 1 of 5") + short(b"labels") + numbers
    items += short(b"data") + array + short(b"filenames") + names
    return b"\x80\x02}q\x01(" + items + b"u."


def python_3_pickle(pixels, labels, protocol):
    return pickle.dumps({b"data": pixels, b"labels": labels, b"batch_label": b"x", b"filenames": [b"a"]}, protocol)


WRITERS = {"python 2": python_2_pickle}
WRITERS |= {
    f"protocol {k}": lambda pixels, labels, k=k: python_3_pickle(pixels, labels, k)
    for k in range(2, pickle.HIGHEST_PROTOCOL + 1)
}


def write_all(folder, write, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    content = {}
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        content[name] = batch()
        (folder / f"{name}{suffix}").write_bytes(write(*content[name]))
    return content


def check(images, content, names):
    pixels = np.concatenate([content[name][0] for name in names]).reshape(-1, 3, 32, 32)
    assert torch.equal(images.batch(range(len(images))), torch.from_numpy(pixels))
    assert images.labels.tolist() == [label for name in names for label in content[name][1]]
    assert images.class_names[3] == "cat"
    assert images.num_classes == 10


TRAIN = [f"data_batch_{k}" for k in range(1, 6)]


def test_a_pickle_of_python_2_is_what_pickle_makes_of_it():
    pixels, labels = batch()
    by_pickle = pickle.loads(python_2_pickle(pixels, labels), encoding="bytes")
    assert (by_pickle[b"data"] == pixels).all()
    assert by_pickle[b"labels"] == labels


@pytest.mark.parametrize("writer", WRITERS)
def test_pickled_batches(tmp_path, writer):
    content = write_all(tmp_path / "cifar-10-batches-py", WRITERS[writer])
    check(open_images(tmp_path, 32), content, TRAIN)
    check(open_images(tmp_path / "cifar-10-batches-py", 32, split="held_out"), content, ["test_batch"])
    check(open_images(tmp_path, 32, layout="cifar10", split="all"), content, [*TRAIN, "test_batch"])


def test_the_binary_version(tmp_path):
    def write(pixels, labels):
        return b"".join(bytes([label]) + row.tobytes() for row, label in zip(pixels, labels))

    content = write_all(tmp_path / "cifar-10-batches-bin", write, ".bin")
    check(open_images(tmp_path, 32, split="all"), content, [*TRAIN, "test_batch"])
    check(open_images(tmp_path, 32), content, TRAIN)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").write_bytes(write(*batch(2))[:-1])
    with pytest.raises(ValueError, match="6145 bytes are no whole number of records of 3073"):
        open_store(tmp_path)
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(ValueError, match="10 is no label from 0 to 9"):
        open_store(tmp_path)


# -- batches that do not fit


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "it has no data of 3072 bytes"),
        ({}, "it has no data of 3072 bytes"),
        ({"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]}, "it has no data of 3072 bytes"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, "it has no data of 3072 bytes"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "it has 1 labels for 2 pictures"),
        ({"data": np.zeros((2, 3072), np.uint8)}, "it has no labels for 2 pictures"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, "10 is no label from 0 to 9"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, -1]}, "-1 is no label from 0 to 9"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0, "1"]}, "str is no label from 0 to 9"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [False, True]}, "False is no label from 0 to 9"),
        ({"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]}, "array that is not one of bytes"),
        ({"data": np.zeros((2, 3072), np.uint8, order="F"), "labels": [0, 1]}, "array that is not one of bytes"),
        ({"data": np.array([object()]), "labels": [0, 1]}, "which plain data need not"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(tmp_path, content, says):
    write_all(tmp_path, python_2_pickle)
    (tmp_path / "data_batch_3").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=f"data_batch_3 is .*{says}"):
        open_store(tmp_path)


def test_pictures_change_with_their_own_batch(tmp_path):
    """What is noted of the others stays."""
    write_all(tmp_path, python_2_pickle)
    store = open_store(tmp_path, "cifar10", "all")
    before = [store.key(k) for k in range(24)]
    os.utime(tmp_path / "data_batch_3", ns=(0, 0))
    (tmp_path / "test_batch").unlink()
    after = [store.key(k) for k in range(24)]
    assert [k for k in range(24) if before[k] != after[k]] == [8, 9, 10, 11, 20, 21, 22, 23]
    assert after[20:] == [None] * 4


def test_what_is_missing_is_named(tmp_path):
    write_all(tmp_path, python_2_pickle)
    (tmp_path / "data_batch_4").unlink()
    with pytest.raises(ValueError, match="data_batch_4 cannot be opened"):
        open_store(tmp_path)
    assert len(open_store(tmp_path, "cifar10", "held_out")) == 4
    (tmp_path / "data_batch_4").write_bytes(b"")
    with pytest.raises(ValueError, match="data_batch_4 is no batch of CIFAR-10: it is no pickle"):
        open_store(tmp_path)
    with pytest.raises(ValueError, match="holds no CIFAR-10"):
        open_store(tmp_path / "nowhere", "cifar10")


def test_a_large_file_is_not_read(tmp_path):
    write_all(tmp_path, python_2_pickle)
    os.truncate(tmp_path / "data_batch_1", 1 << 40)  # it takes no room on the disk
    with pytest.raises(ValueError, match="it has 1099511627776 bytes"):
        open_store(tmp_path)


# -- pickles


class Runs:
    """Unpickled by pickle, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nothing_in_a_pickle_is_run(tmp_path, protocol):
    content = pickle.dumps({"data": Runs(tmp_path / "ran")}, protocol)
    with pytest.raises(Refused, match="it would call 'posix mkdir'"):
        read_plain_pickle(content)
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists()  # so it was a pickle that runs something


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02cbuiltins\neval\n(X\x04\x00\x00\x001+1 tR.",
        b"\x80\x02(X\x04\x00\x00\x001+1 ibuiltins\neval\n.",  # INST
        b"\x80\x02cbuiltins\nlist\n)\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02X\x01\x00\x00\x00xQ.",  # BINPERSID
        b"\x80\x05\x96\x00\x00\x00\x00\x00\x10\x00\x00.",  # BYTEARRAY8 of 16 TB
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x02cnumpy\ndtype\nK\x01\x85R.",
        b"\x80\x02}X\x01\x00\x00\x00xb.",  # BUILD of a dictionary
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x05\x00\x00\x00utf-8\x86R.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R.",  # of no values
        python_2_pickle(*batch()).replace(b"\nndarray\n", b"\nmatrix\n"),
        b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00aK\x01a.",  # a number appended to bytes
        pickle.dumps(np.zeros((2, 3), np.uint8, order="F"), 5),
        b"\x80\x02(K\x01u.",
        b"\x80\x02e.",
        b"\x80\x02h\x05.",
        b"\x80\x02]K\x01s.",
        b"\x80\x02",
        b".",
        b"",
    ],
)
def test_operations_that_plain_data_need_not_are_refused(content):
    with pytest.raises(Refused):
        read_plain_pickle(content)


NESTED = b")" + b"2\x86" * 60  # a tuple of itself twice, 60 times over: to hash or to print it takes 2^60 steps


@pytest.mark.parametrize("content", [b"}" + NESTED + b"K\x01s.", b"cnumpy\ndtype\n" + NESTED + b"\x85R."])
def test_what_would_take_for_ever_to_hash_or_to_print_is_refused_at_once(content):
    with pytest.raises(Refused):
        read_plain_pickle(b"\x80\x02" + content)


def test_a_label_that_would_take_for_ever_to_print_is_refused_at_once(tmp_path):
    nested = ()
    for _ in range(60):
        nested = (nested, nested)
    write_all(tmp_path, python_2_pickle)
    content = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [nested]})
    (tmp_path / "data_batch_1").write_bytes(content)
    with pytest.raises(ValueError, match="tuple is no label"):
        open_store(tmp_path)


def test_an_array_of_an_older_numpy_in_protocol_5():
    content = pickle.dumps({b"\xe9t\xe9": np.arange(6, dtype=np.uint8).reshape(2, 3)}, 5)
    older = content.replace(b"\x13numpy._core.numeric", b"\x12numpy.core.numeric")
    assert older != content
    for each in (content, older):
        ((name, array),) = read_plain_pickle(each).items()
        assert (name, array.tolist()) == ("\xe9t\xe9", [[0, 1, 2], [3, 4, 5]])  # bytes are read a character each


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(PLAIN, st.sampled_from([3, 4, 5]), st.booleans())
def test_plain_data_comes_as_from_pickle(value, protocol, optimized):
    content = pickle.dumps(value, protocol)
    assert read_plain_pickle(pickletools.optimize(content) if optimized else content) == value
