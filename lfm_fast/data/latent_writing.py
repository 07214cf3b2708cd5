"""Latents into a cache on disk, shard by shard, by one process or by many at once.

A shard is written whole or not at all, and what stands and is whole is kept: an interrupted call is simply made again.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from lfm_fast.data.cache import file_state
from lfm_fast.data.latent_cache import (
    STATS_FILE,
    LatentCache,
    known_checksums,
    layout_of,
    moments,
    names_in,
    note_checksums,
    shard_name,
    sums_of,
    write_stats,
)
from lfm_fast.data.shards import file_checksum, is_whole, open_shard, read_header, write_shard
from lfm_fast.distributed import PeerLost, World

_SECONDS_TO_SHOW = 30  # a network's file system remembers for seconds that a file was not there
_BEFORE = {"crop": "centre", "precision": "fp32"}  # what shards are that do not say it
_UNTOLD = ("decoder",)  # what they may be any of


@dataclass
class LatentWriter:
    """One cache to be written: `rows` gives its latents, for the chunks of item numbers that it is asked for.

    rows(chunks) yields a dict of tensors (b, C, h, w) for each of `chunks`, in their order. `provenance` is written
    into every shard and decides whether one that stands is of this cache.
    """

    folder: Path
    labels: Tensor
    class_names: list[str]
    provenance: dict
    rows: Callable[[list[range]], Iterator[dict[str, Tensor]]]
    batch_size: int
    shard_size: int
    progress: bool
    world: World

    def write(self) -> LatentCache:
        """Write what is missing and open the whole; every rank of `world` calls it, and each writes its share.

        Raises:
            ValueError: the folder holds something else, another process writes into it, or what `rows` raises.
            OSError: the disk is full, or the folder cannot be written.
            RuntimeError: another rank has died.
        """
        self._require_one_list()
        with _peers():
            if not self.world.from_main(self._is_finished):  # a whole one is read by many at once
                with _alone(self.folder, self.world):
                    if not self.world.from_main(self._is_finished):
                        self._finish()
            return self.world.main_first(lambda: self._soon(lambda: LatentCache.open(self.folder)))

    def _finish(self):
        count, size = len(self.labels), self.shard_size
        shards = [range(first, min(first + size, count)) for first in range(0, count, size)]
        known = known_checksums(self.folder)
        found = self.world.spread(lambda number: self._look(number, shards[number], known), len(shards))
        missing = [number for number, what in enumerate(found) if what is None]
        if missing and self.world.is_main:
            (self.folder / STATS_FILE).unlink(missing_ok=True)  # no cache any more until it is whole again
        for number, what in zip(missing, self._make(missing, shards)):
            found[number] = what
        self.world.from_main(lambda: self._write_stats(found))

    def _make(self, missing: list[int], shards: list[range]) -> list:
        """Write the shards `missing`, every rank its share; what `_look` finds of each."""
        mine = [shards[number] for number in missing[self.world.rank :: self.world.size]]
        size = self.batch_size
        chunks = [range(k, min(k + size, shard.stop)) for shard in mine for k in range(shard.start, shard.stop, size)]
        quiet = not (self.progress and self.world.is_main) or None  # None: where nobody looks

        looked = {}

        def make(k):
            number = missing[k]
            labels = self.labels[shards[number].start : shards[number].stop]
            with write_shard(self.folder / shard_name(number), labels, self.provenance | {"shard": number}) as shard:
                while shard.missing:
                    before = shard.missing
                    shard.append(next(rows))
                    bar.update(before - shard.missing)
            looked[k] = looking.submit(self._look, number, shards[number], {})

        def look(k):
            found = looked[k].result()
            if found is None:
                path = self.folder / shard_name(missing[k])
                raise OSError(f"{path} was written, but is not whole: check the disk")
            return found

        bar = tqdm(total=sum(map(len, mine)), desc="encoding", unit="image", disable=quiet)
        # rows of all shards at once, so that the next one's are read while one is finished; closed here, since their
        # thread must not be left to the garbage collector. A shard is read back while the next one is encoded
        with bar, contextlib.closing(self.rows(chunks)) as rows, ThreadPoolExecutor(1, "look") as looking:
            self.world.spread(self._aloud(make), len(missing))
            return self.world.spread(self._aloud(look), len(missing))

    def _aloud(self, make):
        """`make`, saying at once what goes wrong: the other ranks finish their shards before all of them raise it."""

        def called(k):
            try:
                return make(k)
            except Exception as error:
                if self.world.size > 1:
                    print(f"rank {self.world.rank}: {error}", file=sys.stderr, flush=True)
                raise

        return called

    def _is_finished(self) -> bool:
        """Whether the cache is whole already. Raises ValueError if what lies there is another one."""
        try:
            cache = LatentCache.open(self.folder)
        except ValueError:
            return False  # nothing there yet, or something of it is damaged: every shard is looked at
        self._require_same(cache.provenance)
        return cache.num_items == len(self.labels)

    def _look(self, number: int, items: range, known: dict[str, int]):
        """(row of stats.json, state of the file, sums) of a shard that is whole, else None; refuses one of another."""
        path = self.folder / shard_name(number)
        header = read_header(path)
        if header is None:
            return None
        self._require_same(header, shard=number)
        state = file_state(path.stat())  # before it is read: one that is replaced later is not the one that was seen
        row = {"file": path.name, "items": len(items), "bytes": state[0], "crc32": file_checksum(path)}
        if known.get(path.name, row["crc32"]) != row["crc32"] or not is_whole(path):
            return None
        shard = open_shard(path)
        if layout_of(shard) is None or len(shard["labels"]) != len(items):
            return None
        return row, state, sums_of(shard, names_in(shard))

    def _soon(self, look):
        """`look()`, tried again where ranks may be on other machines: what one has written may not show at once."""
        end = time.monotonic() + (_SECONDS_TO_SHOW if self.world.size > 1 else 0)
        while True:
            try:
                return look()
            except ValueError:
                if time.monotonic() >= end:
                    raise
                time.sleep(0.2)

    def _require_same(self, found: dict, **more) -> None:
        for key, value in (self.provenance | more).items():
            other = found.get(key, _BEFORE.get(key))
            if other != value and not (other is None and key in _UNTOLD):
                raise ValueError(
                    f"{self.folder} holds latents with {key}={other!r}, but {key}={value!r} is asked for: "
                    "choose another folder, or delete this one."
                )

    def _require_one_list(self) -> None:
        """All ranks see the same images: a folder that changes while they start, or differs between machines."""
        for rank, other in enumerate(self.world.gather_objects(self.provenance)):
            if other != self.provenance:
                key = next(key for key in self.provenance if other.get(key) != self.provenance[key])
                raise ValueError(
                    f"Rank {rank} has {key}={other.get(key)!r}, but rank {self.world.rank} {self.provenance[key]!r}: "
                    "give all ranks the same images and settings."
                )

    def _write_stats(self, found) -> None:
        rows, states, sums = zip(*found)
        for number in range(len(rows)):  # of this cache still, where no lock kept another encoder away
            path = self.folder / shard_name(number)
            self._soon(lambda number=number, path=path: self._require_same(read_header(path) or {}, shard=number))
        mean, std = moments(sums)
        content = {"mean": mean, "std": std, "class_names": list(self.class_names)}
        write_stats(self.folder, content | {"provenance": self.provenance, "shards": rows})
        note_checksums(self.folder, rows, states)


@contextlib.contextmanager
def _alone(folder: Path, world: World):
    """Nobody else encodes into `folder` meanwhile, where its file system has locks; one that dies leaves none."""
    descriptor = None

    def lock():
        nonlocal descriptor
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(ImportError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"Another process is encoding into {folder}: wait for its end, or choose another folder."
                ) from error
            except OSError:
                pass  # a network's file system without locks: a mixture is found at the end, by the shards' headers

    try:
        world.from_main(lock)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def _peers():
    """What a rank says that has lost another one."""
    try:
        yield
    except PeerLost as error:
        raise PeerLost("what is written so far stands: start again and the rest is made") from error
