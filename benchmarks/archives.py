"""The bytes of pictures at random places: archives as this library reads them, and by the packages made for them."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.names import AGAIN, FAST
from benchmarks.workloads import Contender, Workload
from lfm_fast.data.file_list import ListStore
from lfm_fast.data.lmdb_store import open_raw_lmdb
from lfm_fast.data.tar_store import open_tars

LMDB, TAR, TARFILE, FILES = "lmdb package", "tar archive", "tarfile", "a file each"


class ReadingArchives(Workload):
    """`batch` pictures of side x side bare RGB, in a random order, in one thread; none is decoded.

    The fast path is the walk of an LMDB file; `lmdb package` gets the same keys in one transaction. The others hold the
    same bytes: a tar by its index and by tarfile, and files. All are in the page cache after the first round.
    """

    measures_memory = False  # a read's bytes are no tensor

    def __init__(self, folder: str, side: int, count: int, batch: int):
        import lmdb

        self.images, self.moved = batch, batch * 3 * side * side
        path = Path(folder)
        pixels = np.random.default_rng(0).integers(0, 256, (count, 3 * side * side)).astype(np.uint8)
        write_forms(path, [row.tobytes() for row in pixels])
        self.pixels = torch.from_numpy(pixels)
        self.order = np.random.default_rng(1).permutation(count)[:batch].tolist()
        self.environment = lmdb.open(str(path / "lmdb"), readonly=True, lock=False, readahead=False)
        self.tar = tarfile.open(path / "a.tar")  # noqa: SIM115 - stays open, as a data set of one's own keeps it
        self.members = self.tar.getmembers()
        self.stores = {FAST: open_raw_lmdb(path / "lmdb", "train"), AGAIN: open_raw_lmdb(path / "lmdb", "train")}
        self.stores |= {TAR: open_tars(path / "a.tar", "train"), FILES: ListStore(path / "list.txt")}

    def contenders(self):
        reads = {name: store.read for name, store in self.stores.items()} | {TARFILE: self._by_tarfile}
        found = {name: _reading(lambda read=read: [read(k) for k in self.order]) for name, read in reads.items()}
        found[LMDB] = _reading(self._by_lmdb)
        return {FAST: found.pop(FAST), **found}

    def truth(self):
        return [self.pixels[self.order].double()]

    def _by_lmdb(self):
        with self.environment.begin() as transaction:
            return [transaction.get(b"%d" % k) for k in self.order]

    def _by_tarfile(self, position):
        return self.tar.extractfile(self.members[position]).read()


def _reading(call) -> Contender:
    def result():
        return [torch.stack([torch.frombuffer(bytearray(piece), dtype=torch.uint8) for piece in call()]).float()]

    return Contender(call, result)


def write_forms(path: Path, pictures: list[bytes]) -> None:
    """The pictures under their numbers in an LMDB environment, a tar archive, and a file each."""
    import lmdb

    path.mkdir(parents=True, exist_ok=True)
    size = 2 * sum(map(len, pictures)) + (1 << 20)
    with (
        lmdb.open(str(path / "lmdb"), map_size=size, sync=False) as environment,
        environment.begin(write=True) as writes,
        tarfile.open(path / "a.tar", "w") as tar,
    ):
        for k, content in enumerate(pictures):
            writes.put(b"%d" % k, content)
            member = tarfile.TarInfo(f"{k:06d}.ppm")  # the suffix says that it is a picture; it is never decoded
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
            (path / f"{k:06d}.ppm").write_bytes(content)
    (path / "list.txt").write_text("".join(f"{k:06d}.ppm\n" for k in range(len(pictures))))
