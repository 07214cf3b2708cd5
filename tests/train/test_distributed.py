import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import SETTINGS, Run, TinyAutoencoder, TinySource, flags, two_ranks

import lfm_fast
from lfm_fast import distributed
from lfm_fast.distributed import World
from lfm_fast.train import resume
from lfm_fast.train.config import from_preset
from lfm_fast.train.journal import read_metrics
from lfm_fast.train.loop import build_state, train, training_path
from lfm_fast.train.samples import sample_images

GRID = {"sample_every": 12, "guidance_scale": 2.0, "samples_per_class": 3}  # 9 pictures: 4 and 5 on two ranks
CHANGES = {"num_classes": 3, "label_dropout": 0.3, "schedule": "cosine"}


def settings(folder, **changes):
    return from_preset(**{**SETTINGS, "output": str(folder), **CHANGES, **changes})


def losses(folder):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_metrics(folder)]


def assert_close_curves(one, other, every=1):
    """Equal up to rounding: sums of 8 losses in another order, and what 12 steps of 1e-3 make of that.

    The other one logged `every` so many steps, a mean over their losses."""
    one, other = torch.tensor(losses(one)), torch.tensor(losses(other))
    assert (len(one), len(other)) == (12, 12 // every)
    means = one[:, 1].view(-1, every).mean(1)
    one = one[every - 1 :: every].clone()
    one[:, 1] = means
    torch.testing.assert_close(one, other, rtol=1e-4, atol=0)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    config = settings(tmp_path_factory.mktemp("one"), **GRID)
    return train(config, TinySource(), TinyAutoencoder())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    _, statuses = two_ranks(flags(output=folder, **CHANGES, **GRID), folder)
    assert statuses == [0, 0], (folder / "rank0.txt").read_text() + (folder / "rank1.txt").read_text()
    return folder


def test_two_ranks_give_the_curve_of_one(one_rank, two):
    assert_close_curves(one_rank, two / "000-DiT-Tiny")


@pytest.mark.parametrize("compiled", ["off", "block"])
def test_two_ranks_compiled_and_checkpointed_give_the_same_curve(tmp_path, one_rank, compiled):
    """No graph is cut at the gradient buckets, which a checkpointed region would not survive."""
    changes = {"compile": compiled, "activation_checkpointing": "selective"}
    _, statuses = two_ranks(flags(output=tmp_path, **CHANGES, **changes), tmp_path, {"TINY_BACKEND": "eager"})
    assert statuses == [0, 0], (tmp_path / "rank0.txt").read_text() + (tmp_path / "rank1.txt").read_text()
    assert_close_curves(one_rank, tmp_path / "000-DiT-Tiny")


def test_rank_0_alone_writes(two):
    assert (two / "rank1.txt").read_text() == ""
    assert "2 x cpu" in (two / "rank0.txt").read_text()
    assert [path.stem for path in resume.run_checkpoints(two / "000-DiT-Tiny")] == ["0000012", "0000008", "0000004"]


def test_two_ranks_draw_the_grid_of_one(one_rank, two):
    for name in ("0000000.png", "0000012.png"):
        one, other = (
            np.asarray(Image.open(f / "samples" / name)).astype(int) for f in (one_rank, two / "000-DiT-Tiny")
        )
        assert one.shape == other.shape
        assert one.std() > 20  # there is a picture
        # one level of 255: weights that differ by rounding move a value across a rounding boundary
        assert np.abs(one - other).max() <= 1


def test_ranks_samples_are_the_union_of_one_ranks():
    """The same weights: rank r of 3 makes exactly the pictures that are its own of one rank's."""
    config = settings("unused")
    state, parts = build_state(config, TinySource(), World()), []
    with torch.no_grad():
        for parameter in state.ema.average.final_layer.parameters():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 0])

    def pictures(world):
        return sample_images(
            state.ema.average, labels, (4, 8, 8), TinyAutoencoder(), config, training_path(config), world
        )

    class Alone(World):
        def gather(self, tensor):
            return tensor

    whole = pictures(World())
    parts = [pictures(Alone(rank=rank, size=3)) for rank in range(3)]
    assert [len(part) for part in parts] == [2, 2, 3]
    # a matrix product over fewer rows may sum in another order
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("first", "every"), [(1, 1), (2, 1), (2, 3)])
def test_a_run_goes_on_at_another_world_size(tmp_path, one_rank, first, every):
    """Stopped on one number of ranks, continued on the other; also where every rank has losses not yet logged."""

    def start(ranks):
        settings = flags(output=tmp_path, **CHANGES, log_every=every)
        if ranks == 2:
            runs, statuses = two_ranks(settings, tmp_path)
        else:
            runs = [Run(settings, tmp_path / "alone.txt")]
            statuses = [runs[0].status()]
        assert set(statuses) == {0}
        return runs[0].text()

    start(first)
    folder = tmp_path / "000-DiT-Tiny"
    for path in resume.run_checkpoints(folder)[:2]:  # as if it had been killed after step 4
        path.unlink()
    text = start(3 - first)
    assert f"going on from {folder / 'checkpoints' / '0000004.safetensors'}" in text
    assert_close_curves(one_rank, folder, every)


def test_a_signal_to_one_rank_stops_both(tmp_path):
    runs, statuses = two_ranks(
        flags(output=tmp_path, steps=100_000),
        tmp_path,
        {"TINY_DELAY": "0.01"},
        lambda runs: (runs[0].wait_for("step 2/"), runs[1].signal(signal.SIGTERM)),
    )
    assert statuses == [0, 0]
    step = int(re.search(r"Stopped after step (\d+)", runs[0].text())[1])
    assert resume.newest_step(tmp_path / "000-DiT-Tiny") == step


def test_a_mistake_that_rank_0_finds_ends_every_rank_with_its_sentence(tmp_path):
    folder = train(settings(tmp_path, steps=2), TinySource())
    runs, statuses = two_ranks(flags(output=tmp_path, steps=1, resume=folder), tmp_path)
    assert statuses == [2, 2]
    for run in runs:
        assert run.text() == (
            f"error: --resume {folder}: it has reached step 2, and the settings ask for 1; give a larger --steps or "
            "--epochs\n"
        )


def test_torchrun_starts_it(tmp_path):
    """The launcher itself: two ranks, threads shared out, status 0."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": str(Path(lfm_fast.__file__).parent.parent)}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(here / "tiny_run.py"), *flags(output=tmp_path, steps=2)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Finished 2 steps") == 1


# --- the pieces ---


@pytest.mark.parametrize(("count", "size"), [(8, 3), (1, 4), (0, 2), (7, 7)])
def test_shares_are_whole_and_even(count, size):
    shards = [World(rank=rank, size=size).shard(count, first=5) for rank in range(size)]
    assert torch.equal(torch.cat(shards), torch.arange(5, 5 + count))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_one_rank_needs_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    world = distributed.start("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    tensor = torch.arange(3)
    assert world.sum(tensor) is tensor
    assert torch.equal(world.gather(tensor), tensor)
    assert world.from_main(lambda: 5) == 5
    world.barrier()
    world.close()


@pytest.mark.parametrize(
    ("wish", "launched", "ranks", "expected"),
    [
        (None, False, 1, None),
        (None, True, 2, "share"),
        ("1", True, 2, "share"),
        ("3", True, 2, None),
        ("1", False, 2, None),
    ],
)
def test_threads_are_shared_out_unless_the_user_said(monkeypatch, wish, launched, ranks, expected):
    """None: left as they are. torchrun's own OMP_NUM_THREADS=1 is nobody's wish."""
    for name, value in (("OMP_NUM_THREADS", wish), ("TORCHELASTIC_RUN_ID", "x" if launched else None)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    distributed._set_threads(ranks)
    assert asked == ([8 // ranks] if expected else [])


def test_cuda_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        distributed.start("cuda")


def test_a_batch_smaller_than_the_world_is_refused(tmp_path):
    from lfm_fast.train.source import check_source

    with pytest.raises(ValueError, match="batch_size is 8 for 9 ranks"):
        check_source(settings(tmp_path), TinySource(), World(size=9))
