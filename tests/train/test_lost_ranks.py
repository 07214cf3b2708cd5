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
    bugs = (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("[enforce fail at /x/gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4"),
        dist.DistBackendError("NCCL error: invalid usage\nLast error:\nDuplicate GPU detected : rank 0 and rank 1"),
    )
    for bug in bugs:
        assert not distributed.is_of_lost_peer(bug)
        with pytest.raises(RuntimeError) as raised, distributed._exchange():
            raise bug
        assert raised.value is bug
    with pytest.raises(distributed.PeerLost), distributed._exchange():
        raise dist.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed.")
    assert distributed.is_of_lost_peer(RuntimeError("[/x/gloo/gloo/transport/tcp/pair.cc:553] Connection closed"))
    assert distributed.is_of_lost_peer(dist.DistBackendError("NCCL communicator was aborted"))


def test_a_rank_that_never_comes_is_not_waited_for_for_days(monkeypatch, unused_tcp_port):
    here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (here | {"MASTER_PORT": str(unused_tcp_port), "OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "MEETING_TIMEOUT", timedelta(seconds=1))
    said = rf"the 2 ranks have not all met at 127.0.0.1:{unused_tcp_port}; start all of them again \(.*[Tt]imed out.*\)"
    with pytest.raises(OSError, match=rf"^{said}$"):
        distributed.start("cpu")
    assert not dist.is_initialized()


def test_a_meeting_that_is_broken_off_leaves_no_group(monkeypatch, unused_tcp_port):
    def closed(group):
        raise RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer\nand more")

    here = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_tcp_port)}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "barrier", closed)
    with pytest.raises(OSError, match=r"start all of them again \(\[/x/gloo/.*Connection closed by peer\)$"):
        distributed._meet(1, gloo=True)
    assert not dist.is_initialized()


def test_the_group_that_ranks_with_gpus_meet_in_is_not_kept(monkeypatch):
    """Its sockets, one to each peer, would count beside those of the group that stays."""
    groups = iter(["meeting", "control"])
    called = []
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: called.append(backend))
    monkeypatch.setattr(dist, "new_group", lambda backend, timeout: called.append(next(groups)) or called[-1])
    monkeypatch.setattr(dist, "barrier", lambda group: called.append(f"wait in {group}"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: called.append(f"leave {group}"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.start("cuda").control == "control"
    assert called == ["nccl", "meeting", "wait in meeting", "control", "leave meeting"]


@pytest.fixture
def unused_tcp_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
