"""A rank that is killed, or never comes, and memory that is not enough: one sentence that says how to go on."""

import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from tiny_run import SETTINGS, TinySource, flags, two_ranks

from lfm_fast import distributed
from lfm_fast.train import loop, resume
from lfm_fast.train.config import from_preset

LONG = {"steps": 100_000, "checkpoint_every": 3}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_with_a_sentence(tmp_path, rank):
    runs, statuses = two_ranks(
        flags(output=tmp_path, **LONG),
        tmp_path,
        {"TINY_DELAY": "0.01"},
        lambda runs: (runs[0].wait_for("step 7/"), runs[rank].signal(signal.SIGKILL), end(runs[1 - rank])),
    )
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] in (1, -signal.SIGTERM)  # which Python no longer handles in its last moments
    folder = tmp_path / "000-DiT-Tiny"
    newest = resume.run_checkpoints(folder)[0]
    assert int(newest.stem) >= 6
    said = [line for line in runs[1 - rank].text().splitlines() if not line.startswith(("Training", "step"))]
    assert said == [
        f"error: another rank has ended before its part was done; go on from {newest} with --resume {folder}"
    ]


def end(run):
    """As torchrun does with the ranks that are left, and again and again."""
    while run.process.is_alive():
        run.signal(signal.SIGTERM)
        time.sleep(0.01)


def test_a_rank_killed_before_the_first_checkpoint(tmp_path):
    runs, statuses = two_ranks(
        flags(output=tmp_path, steps=100_000, checkpoint_every=100_000),
        tmp_path,
        {"TINY_DELAY": "0.01"},
        lambda runs: (runs[0].wait_for("step 1/"), runs[0].signal(signal.SIGKILL)),
    )
    assert statuses == [-signal.SIGKILL, 1]
    assert runs[1].text() == (
        "error: another rank has ended before its part was done; no checkpoint had been written yet\n"
    )


def test_too_little_memory_is_a_sentence_and_a_bug_is_none(tmp_path, monkeypatch, capsys):
    class Large(TinySource):
        size = 2**50  # bytes: more than any address

        def batch(self, sample_numbers, seed):
            if self.size == 0:
                raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
            return torch.empty(self.size, dtype=torch.uint8), None

    source, train = Large(), loop.train
    monkeypatch.setattr(loop, "train", lambda config: train(config, source))
    config = from_preset(**{**SETTINGS, "output": str(tmp_path)})
    assert loop.main(config) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: there is not enough memory; a smaller --batch-size, more --accumulation-steps")
    assert said.endswith("you tried to allocate 1125899906842624 bytes. Error code 12 (Cannot allocate memory))")
    source.size = 0
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        loop.main(config)


def test_what_only_a_bug_says_stays_as_it_is():
    assert not distributed.is_of_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert distributed.is_of_lost_peer(RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed"))
    assert distributed.is_of_lost_peer(dist.DistBackendError("NCCL communicator was aborted"))


def test_a_rank_that_never_comes_is_not_waited_for_for_days(monkeypatch, unused_tcp_port):
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (here | {"MASTER_PORT": str(unused_tcp_port), "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "MEETING_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(OSError, match=rf"the 2 ranks have not all met at 127.0.0.1:{unused_tcp_port}; start all"):
        distributed.start("cpu")
    assert not dist.is_initialized()


@pytest.fixture
def unused_tcp_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
