"""Two ranks encode one set of images: the files of one process, and whatever happens to one, the other one ends."""

import pytest
import torch
from encoding_ranks import SETTINGS, encode_on_two
from small_images import Pixels, Pooling, files_of

from lfm_fast.data import latent_writing
from lfm_fast.data.encoding import encode_images
from lfm_fast.data.latent_cache import LatentCache
from lfm_fast.data.latent_writing import LatentWriter
from lfm_fast.data.shards import is_whole
from lfm_fast.distributed import World


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    encode_images(Pixels(), Pooling(), folder, **SETTINGS)
    return files_of(folder)


def test_two_ranks_write_the_files_of_one_and_share_the_work(tmp_path, expected):
    # shards of 3, 3, 3, 3, 1 images in batches of 2: 2 + 2 + 1 calls and 2 + 2
    assert encode_on_two(tmp_path / "a") == [(0, "13 items, 5 calls"), (0, "13 items, 4 calls")]
    assert files_of(tmp_path / "a") == expected
    assert LatentCache.open(tmp_path / "a", verify=True).num_items == 13
    (tmp_path / "a" / "latents-00002.safetensors").unlink()
    assert encode_on_two(tmp_path / "a") == [(0, "13 items, 2 calls"), (0, "13 items, 0 calls")]
    assert files_of(tmp_path / "a") == expected
    assert encode_on_two(tmp_path / "a") == [(0, "13 items, 0 calls"), (0, "13 items, 0 calls")]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_with_a_sentence_and_the_next_call_goes_on(tmp_path, expected, rank):
    folder = tmp_path / "a"
    ends = encode_on_two(folder, failing=(rank, "killed", 2))
    assert ends[rank] == (-9, "")
    assert ends[1 - rank] == (
        2,
        "PeerLost: another rank has ended before its part was done; what is written so far stands: start again and the "
        "rest is made",
    )
    assert not (folder / "stats.json").exists()
    standing = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    # the other one's shards are all there, and the one that the killed rank had finished
    assert standing == [f"latents-0000{number}.safetensors" for number in ((0, 1, 3), (0, 1, 2, 4))[rank]]
    assert all(is_whole(folder / name) for name in standing)
    assert [status for status, _ in encode_on_two(folder)] == [0, 0]
    assert files_of(folder) == expected  # the half-written file of the killed one is gone, too


def test_an_error_of_one_rank_is_raised_by_both_when_the_other_has_made_its_share(tmp_path, expected):
    folder = tmp_path / "a"
    ends = encode_on_two(folder, failing=(1, "raises", 2))
    assert ends == [(2, "ValueError: this image is not for me")] * 2
    said = (tmp_path / "a.rank1.txt").read_text()
    assert "rank 1: this image is not for me" in said  # at once
    assert sorted(path.name for path in folder.iterdir()) == [f"latents-0000{k}.safetensors" for k in (0, 1, 2, 4)]
    assert [status for status, _ in encode_on_two(folder)] == [0, 0]
    assert files_of(folder) == expected


def test_ranks_that_see_other_images_are_refused(tmp_path):
    ends = encode_on_two(tmp_path / "a", changes={"shift": 1})
    assert [status for status, _ in ends] == [2, 2]
    assert all("has images_digest=" in said and "give all ranks the same images" in said for _, said in ends)
    assert not (tmp_path / "a").exists()


def test_a_world_of_one_spreads_to_itself():
    assert World().spread(lambda number: number * number, 4) == [0, 1, 4, 9]
    assert World().gather_objects("x") == ["x"]
    with pytest.raises(ZeroDivisionError):
        World().spread(lambda number: 1 // (2 - number), 4)


def test_what_another_machine_wrote_may_show_late(tmp_path, monkeypatch):
    """With several ranks it is waited for, alone it is not."""
    writer = LatentWriter(tmp_path, torch.zeros(1), ["a"], {}, None, 1, 1, False, World())
    answers = [ValueError("not there"), ValueError("not there"), "cache"]

    def look():
        answer = answers.pop(0)
        if isinstance(answer, ValueError):
            raise answer
        return answer

    with pytest.raises(ValueError, match="not there"):
        writer._soon(look)
    writer.world = World(size=2)
    assert writer._soon(look) == "cache"
    answers += [ValueError("gone")] * 100
    monkeypatch.setattr(latent_writing, "_SECONDS_TO_SHOW", 0.3)
    with pytest.raises(ValueError, match="gone"):
        writer._soon(look)
