"""The file of a shard, against safetensors' own reader and writer."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lfm_fast.data.shards import is_whole, open_shard, read_header, write_shard

PROVENANCE = {"format": 1, "source": "ünï", "shard": 3}


def tensors(count=7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(count, 3, 5, 2, generator=generator).to(dtype)
    return {"mean": mean, "log_variance": -mean, "mean_flip": mean.flip(-1), "log_variance_flip": -mean.flip(-1)}


def write(path, rows, labels, step=3):
    with write_shard(path, labels, PROVENANCE) as shard:
        for first in range(0, len(labels), step):
            shard.append({name: values[first : first + step] for name, values in rows.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 3, 7])
def test_safetensors_reads_what_is_written(tmp_path, dtype, step):
    rows, labels = tensors(dtype=dtype), torch.arange(7)
    write(tmp_path / "a", rows, labels, step)
    found = load_file(tmp_path / "a")
    assert found.keys() == {*rows, "labels"}
    assert all(torch.equal(found[name], values) for name, values in {**rows, "labels": labels}.items())
    with safe_open(tmp_path / "a", framework="pt") as file:
        assert json.loads(file.metadata()["lfm_fast"]) == PROVENANCE == read_header(tmp_path / "a")
    assert is_whole(tmp_path / "a")
    # numbers lie at multiples of their size, for who maps them
    head = 8 + int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert head % 8 == 0
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())


def test_the_bytes_do_not_depend_on_how_many_rows_come_at_once(tmp_path):
    for step in (1, 2, 7):
        write(tmp_path / str(step), tensors(), torch.arange(7), step)
    contents = [(tmp_path / str(step)).read_bytes() for step in (1, 2, 7)]
    assert contents[0] == contents[1] == contents[2]


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    """In the tensors it is found; in the header it is found, or changes what the shard says it is of."""
    path = tmp_path / "a"
    write(path, tensors(2), torch.arange(2))
    content, expected = path.read_bytes(), load_file(path)
    head = 8 + int.from_bytes(content[:8], "little")
    found = 0
    for place in range(0, len(content), 5):  # every bit of a byte in turn
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        if not is_whole(path):
            found += 1
            continue
        assert place < head
        assert read_header(path) != PROVENANCE or all(
            torch.equal(tensor, expected[name]) for name, tensor in load_file(path).items()
        )
    assert found >= (len(content) - head) // 5


def test_a_truncated_or_missing_shard_is_not_whole(tmp_path):
    path = tmp_path / "a"
    assert not is_whole(path)
    write(path, tensors(2), torch.arange(2))
    content = path.read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:length])
        assert not is_whole(path)
        assert read_header(path) is None
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        open_shard(path)


def test_a_shard_without_checksums_is_taken_by_its_lengths(tmp_path):
    """As the first version wrote them."""
    save_file(tensors() | {"labels": torch.arange(7)}, tmp_path / "a", metadata={"lfm_fast": json.dumps(PROVENANCE)})
    assert is_whole(tmp_path / "a")
    assert read_header(tmp_path / "a") == PROVENANCE


def test_rows_that_are_missing_are_our_own_mistake(tmp_path):
    with pytest.raises(AssertionError, match="2 rows were not written"):
        write(tmp_path / "a", {"latents": torch.zeros(2, 1, 1, 1)}, torch.arange(4))
    assert list(tmp_path.iterdir()) == []
