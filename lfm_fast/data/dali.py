"""Pictures decoded by NVIDIA DALI, on the CPU or on a GPU; what DALI would decode otherwise than Pillow, by Pillow.

Order, mirrors and shards are not DALI's business: it is handed the bytes of the pictures wanted and gives their pixels
back. So whoever decodes, a run reads the same items in the same order, and resuming needs no state of DALI's.
"""

import os
import threading
import warnings
import weakref
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch

from lfm_fast.data.decoders import THREADS, PillowDecoder, content_at, pieces, workers
from lfm_fast.data.headers import plain_header
from lfm_fast.data.reading import draft_scale
from lfm_fast.data.resizing import square_of

AT_ONCE, READ_AT_ONCE = 64, 8  # pictures of a run of the pipeline, and of a task that reads them
CUT_AT_ONCE = 4  # of a task that scales and cuts them
MOST_PIXELS = 1 << 26  # of a picture that DALI is given, and of all of a run together: 200 MB
PATIENCE = 8  # runs in a row that fail before DALI is left alone


class DaliDecoder:
    """Pictures decoded by DALI; those that it would decode otherwise than Pillow, by `pillow`.

    Args:
        device: "cpu", or a CUDA device: the pictures are decoded there (nvJPEG, the hardware decoder where there is
            one) and stay there. Never run on a GPU so far.
        pillow: the `PillowDecoder` of the others; with its `draft`, also of JPEGs that it reads at half resolution.
    """

    name = "dali"

    def __init__(self, device="cpu", pillow: PillowDecoder | None = None):
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # the thread that decodes has a device of its own
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.pillow = PillowDecoder() if pillow is None else pillow
        self._begin()

    def _begin(self):
        self._pipeline, self._lock, self._failures, self._process = None, threading.Lock(), 0, None

    def __getstate__(self):
        return {"device": self.device, "pillow": self.pillow}  # another process builds a pipeline of its own

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin()

    def decode(self, contents: Sequence[bytes], image_size: int) -> torch.Tensor:
        """As `PillowDecoder.decode`; the batch is on the decoder's device."""
        if not self._usable():
            return self.pillow.decode(contents, image_size).to(self.device)
        with self._lock:  # the pipeline serves one batch at a time
            return self._decode(contents, image_size).permute(0, 3, 1, 2)

    def _usable(self) -> bool:
        """DALI's threads do not survive a fork: a forked process does without."""
        if self._process is None:
            self._process = os.getpid()
        return self._process == os.getpid() and self._failures < PATIENCE

    def _decode(self, contents, image_size):
        """DALI decodes run after run while the pool reads what comes next, and cuts what came before."""

        def read(places):
            some = [(place, content_at(contents, place)) for place in places]
            return [(place, encoded, self._size(encoded, image_size)) for place, encoded in some]

        reading = iter([workers().submit(read, places) for places in pieces(len(contents), READ_AT_ONCE)])
        batch = _Batch(len(contents), image_size, self.device, self.pillow)
        for _ in pieces(len(contents), AT_ONCE):
            chunk = [one for piece in islice(reading, AT_ONCE // READ_AT_ONCE) for one in piece.result()]
            batch.leave_to_pillow([member for member in chunk if member[2] is None])
            for members in _runs([member for member in chunk if member[2] is not None]):
                pictures = self._run(members)
                if pictures is None:
                    batch.leave_to_pillow(members)
                else:
                    batch.put([place for place, *_ in members], pictures)
        return batch.whole()

    def _size(self, encoded, image_size) -> tuple[int, int, int] | None:
        """(height, width, 3) of a picture that DALI decodes as Pillow does."""
        header = plain_header(encoded)
        if header is None or header.width * header.height > MOST_PIXELS:
            return None
        size = header.width, header.height
        if self.pillow.draft and header.kind == "jpeg" and draft_scale(size, 2 * image_size) > 1:
            return None
        return header.height, header.width, 3

    def _run(self, members):
        """Pictures (H, W, 3) uint8, or None: DALI fails on one of them and does not say on which."""
        try:
            if self._pipeline is None:
                self._pipeline = _pipeline(self.device)
            (found,) = self._pipeline.run(encoded=[np.frombuffer(encoded, np.uint8) for _, encoded, _ in members])
            if [tuple(shape) for shape in found.shape()] != [size for *_, size in members]:
                raise RuntimeError("a picture has another size than its header says")
        except Exception as error:  # its errors have no kind of their own
            self._pipeline = None  # one that failed once is of no use
            self._failures += 1
            if self._failures == PATIENCE:
                says = f"DALI failed {PATIENCE} times in a row, Pillow decodes from here on: "
                warnings.warn(says + " ".join(str(error).split())[:200], stacklevel=2)
            return None
        self._failures = 0
        return found


class _Batch:
    """(B, S, S, 3) uint8 on the device, filled as pictures come; Pillow's are made on the host."""

    def __init__(self, count, image_size, device, pillow):
        self.pillow, self.on_gpu = pillow, device.type == "cuda"
        self.pixels = np.empty((count, image_size, image_size, 3), np.uint8)
        host = torch.from_numpy(self.pixels)
        self.pictures = torch.empty_like(host, device=device) if self.on_gpu else host
        self.from_host, self.waiting, self.ready = {}, [], None

    def leave_to_pillow(self, members):
        for place, encoded, _ in members:
            self.from_host[place] = workers().submit(self.pillow.decode_one, self.pixels, place, encoded)

    def put(self, places, found):
        """Pictures of DALI's, whole: cut to squares and written where they belong."""
        if not self.on_gpu and len(places) == len(self.pictures) and set(found.shape()) == {self.pixels.shape[1:]}:
            self.ready = torch.from_dlpack(found.as_tensor())  # there is nothing to cut: not even a copy
            return

        def cut(some):
            for k in some:
                self.pictures[places[k]] = square_of(torch.from_dlpack(found[k]), self.pixels.shape[1])

        for some in pieces(len(places), CUT_AT_ONCE):
            if self.on_gpu:  # that only starts the work
                cut(some)
            else:
                self.waiting.append(workers().submit(cut, some))
        if self.on_gpu:  # DALI takes its memory back when `found` goes, and knows nothing of PyTorch's stream
            torch.cuda.current_stream(self.pictures.device).synchronize()

    def whole(self) -> torch.Tensor:
        """The batch, when it is. Raises `UndecodableImage` for the first picture that Pillow cannot decode."""
        if self.ready is not None:
            return self.ready
        for place in sorted(self.from_host):
            self.from_host[place].result()
        for cut in self.waiting:
            cut.result()
        if self.on_gpu:
            for place in self.from_host:
                self.pictures[place] = torch.from_numpy(self.pixels[place])
        return self.pictures


def _runs(members):
    """The members in order, in lists of no more than MOST_PIXELS together."""
    some, pixels = [], 0
    for member in members:
        height, width, _ = member[2]
        if pixels + width * height > MOST_PIXELS:
            yield some
            some, pixels = [], 0
        some.append(member)
        pixels += width * height
    if some:
        yield some


def _pipeline(device):
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=AT_ONCE, num_threads=THREADS, device_id=device.index, prefetch_queue_depth=1)
    def define():
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)  # they outlive the run
        where = "mixed" if device.type == "cuda" else "cpu"
        return fn.decoders.image(encoded, device=where, output_type=types.RGB, jpeg_fancy_upsampling=True)

    built = define()
    _built.add(built)
    return built


# A forked process that let go of a pipeline would wait for ever for its threads, which do not run there: it keeps all.
_built, _inherited = weakref.WeakSet(), []
os.register_at_fork(before=lambda: _inherited.extend(_built), after_in_parent=_inherited.clear)
