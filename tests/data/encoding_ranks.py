"""Two processes that encode one set of images as two ranks. Imported by tests, and in the processes."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

from small_images import Pixels, Pooling

from lfm_fast import distributed
from lfm_fast.data.encoding import encode_images

SETTINGS = {"shard_size": 3, "batch_size": 2, "progress": False}  # 13 images: shards 0, 2, 4 and 1, 3


class Failing(Pooling):
    """Does `what` at call number `at`."""

    def __init__(self, what, at):
        super().__init__()
        self.what, self.at = what, at

    def encode(self, images):
        if self.calls == self.at:
            if self.what == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.what == "raises":
                raise ValueError("this image is not for me")
        return super().encode(images)


def context():
    """Processes forked from a server that has imported what they need, and what training's tests need of it later."""
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (here, here.parent / "train", here.parent.parent)))
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["encoding_ranks", "tiny_run", "torch._dynamo"])  # if it does not run yet
    return forked


def encode_on_two(folder, *, failing=None, changes=None, seconds=120):
    """[(exit status, last line)] of both ranks. `failing` is (rank, what, at which call), `changes` are rank 1's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = [folder.with_name(f"{folder.name}.rank{rank}.txt") for rank in range(2)]
    notes = os.environ["LFM_FAST_CACHE"]  # the server may be older than the test that sets it
    arguments = [(folder, rank, port, notes, said[rank], failing, changes) for rank in range(2)]
    ranks = [context().Process(target=_rank, args=given, daemon=True) for given in arguments]
    for rank in ranks:
        rank.start()
    end = time.monotonic() + seconds
    for rank in ranks:
        rank.join(max(0, end - time.monotonic()))
        assert not rank.is_alive(), "it hangs: " + "".join(path.read_text() for path in said)
    return [(rank.exitcode, (path.read_text().splitlines() or [""])[-1]) for rank, path in zip(ranks, said)]


def _rank(folder, rank, port, notes, said, failing, changes):
    file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["LFM_FAST_CACHE"] = notes
    world = distributed.start("cpu")
    autoencoder = Failing(*failing[1:]) if failing and failing[0] == rank else Pooling()
    source = Pixels(**(changes or {} if rank else {}))
    try:
        cache = encode_images(source, autoencoder, folder, world=world, **SETTINGS)
        print(f"{cache.num_items} items, {autoencoder.calls} calls", flush=True)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(2)
    finally:
        world.close()
