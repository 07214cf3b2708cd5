"""Pictures decoded, halved, resized and cut by NVIDIA DALI, on the CPU or on a GPU; what DALI cannot, by Pillow.

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
from lfm_fast.data.reading import LONGEST_RATIO, CropPlan, draft_scale, plan_crop

AT_ONCE, READ_AT_ONCE = 64, 8  # pictures of a run of a pipeline, and of a task that reads them
MOST_PIXELS = 1 << 26  # of a picture that DALI is given, and of all of a run together: 200 MB
# Pillow rounds up twice at each halving, DALI not at all on the average: half a level apart. Where a side is odd,
# Pillow's boxes lie up to half a pixel aside, which on photographs makes 3 to 6 levels: those are Pillow's.
MOST_HALVINGS = 3
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
        self._pipelines, self._lock, self._failures, self._process = {}, threading.Lock(), 0, None

    def __getstate__(self):
        return {"device": self.device, "pillow": self.pillow}  # another process builds pipelines of its own

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin()

    def decode(self, contents: Sequence[bytes], image_size: int) -> torch.Tensor:
        """As `PillowDecoder.decode`; the batch is on the decoder's device."""
        if not self._usable():
            return self.pillow.decode(contents, image_size).to(self.device)
        with self._lock:  # a pipeline serves one batch at a time
            return self._decode(contents, image_size)

    def _usable(self) -> bool:
        """DALI's threads do not survive a fork: a forked process does without."""
        if self._process is None:
            self._process = os.getpid()
        return self._process == os.getpid() and self._failures < PATIENCE

    def _decode(self, contents, image_size):
        """DALI takes chunk after chunk while the pool reads what comes next and Pillow decodes what is left to it."""

        def read(places):
            some = [(place, content_at(contents, place)) for place in places]
            return [(place, encoded, *self._planned(encoded, image_size)) for place, encoded in some]

        reading = iter([workers().submit(read, places) for places in pieces(len(contents), READ_AT_ONCE)])
        found = _Batch(len(contents), image_size, self.device)
        for _ in pieces(len(contents), AT_ONCE):
            chunk = [one for piece in islice(reading, AT_ONCE // READ_AT_ONCE) for one in piece.result()]
            for place, encoded in self._decode_chunk(found, chunk):
                found.waiting[place] = workers().submit(self.pillow.decode_one, found.pixels, place, encoded)
        return found.whole().permute(0, 3, 1, 2)

    def _decode_chunk(self, batch, chunk):
        """Let DALI decode what it can of [(place, encoded, size, plan)]; gives (place, encoded) of the others back."""
        groups, others = {}, []
        for place, encoded, size, plan in chunk:
            if plan is None:
                others.append((place, encoded))
            else:
                groups.setdefault((len(plan.halved), _end(size, plan)), []).append((place, encoded, size, plan))
        for kind, members in groups.items():
            for some in _runs(members):
                pictures = self._run(kind, some, batch.image_size)
                if pictures is None:
                    others += [(place, encoded) for place, encoded, _, _ in some]
                else:
                    batch.put([place for place, *_ in some], pictures)
        return others

    def _planned(self, encoded, image_size) -> tuple[tuple[int, int], CropPlan] | tuple[None, None]:
        """(size, plan) of a picture that DALI decodes as Pillow does."""
        header = plain_header(encoded)
        if header is None:
            return None, None
        size = header.width, header.height
        drafted = self.pillow.draft and header.kind == "jpeg" and draft_scale(size, 2 * image_size) > 1
        too_long = max(size) > LONGEST_RATIO * min(size)
        if drafted or too_long or size[0] * size[1] > MOST_PIXELS:
            return None, None
        plan = plan_crop(size, image_size)
        odd = any(side % 2 for halved in [size, *plan.halved][:-1] for side in halved)
        return (None, None) if odd or len(plan.halved) > MOST_HALVINGS else (size, plan)

    def _run(self, kind, members, image_size) -> torch.Tensor | None:
        """(n, S, S, 3) uint8 of pictures of one kind, or None: DALI fails on one of them and does not say on which."""
        key = (image_size, *kind)
        try:
            if key not in self._pipelines:
                self._pipelines[key] = _pipeline(self.device, image_size, *kind)
            inputs = {"encoded": [np.frombuffer(encoded, np.uint8) for _, encoded, _, _ in members]}
            if kind != (0, "whole"):
                inputs["plan"] = [_numbers(size, plan, image_size) for _, _, size, plan in members]
            found, sizes = self._pipelines[key].run(**inputs)
            expected = [(height, width, 3) for _, _, (width, height), _ in members]
            if not np.array_equal(np.asarray(sizes.as_tensor()), expected):
                raise RuntimeError("a picture has another size than its header says")
            found = torch.from_dlpack(found.as_tensor())
        except Exception as error:  # its errors have no kind of their own
            self._pipelines.pop(key, None)  # a pipeline that failed once is of no use
            self._failures += 1
            if self._failures == PATIENCE:
                reason = " ".join(str(error).split())[:200]
                warnings.warn(
                    f"DALI failed {PATIENCE} times in a row, Pillow decodes from here on: {reason}", stacklevel=2
                )
            return None
        self._failures = 0
        return found


class _Batch:
    """A batch as its pictures come: (n, S, S, 3) uint8 on the device, or on the host where Pillow makes them."""

    def __init__(self, count, image_size, device):
        self.shape, self.image_size, self.device = (count, image_size, image_size, 3), image_size, device
        self.pixels, self.parts, self.waiting = np.empty(self.shape, np.uint8), [], {}

    def put(self, places, pictures):
        self.parts.append((places, pictures))

    def whole(self) -> torch.Tensor:
        """Waits for Pillow. Raises `UndecodableImage` for the first picture that it cannot decode."""
        on_gpu = self.device.type == "cuda"
        if len(self.parts) == 1 and not self.waiting and not on_gpu:
            return self.parts[0][1]  # without a copy
        for place in sorted(self.waiting):
            self.waiting[place].result()
        together = torch.from_numpy(self.pixels)
        if on_gpu:
            together = together.to(self.device) if self.waiting else torch.empty_like(together, device=self.device)
        for places, pictures in self.parts:
            for place, picture in zip(places, pictures):
                together[place] = picture
        if on_gpu:  # DALI takes its memory back when the parts go, and knows nothing of PyTorch's stream
            torch.cuda.current_stream(self.device).synchronize()
        return together


def _runs(members):
    """The members in order, in lists of no more than MOST_PIXELS together."""
    some, pixels = [], 0
    for member in members:
        width, height = member[2]
        if some and pixels + width * height > MOST_PIXELS:
            yield some
            some, pixels = [], 0
        some.append(member)
        pixels += width * height
    yield some


def _end(size, plan) -> str:
    """What is left to do with the last of the halved sizes."""
    last = plan.halved[-1] if plan.halved else size
    if last != plan.scaled:
        return "resize"
    return "cut" if plan.left or plan.top or last[0] != last[1] else "whole"


def _numbers(size, plan, image_size) -> np.ndarray:
    """(halvings + 2, 2) float32, each (y, x): the halved sizes, then where the square begins and ends in the last."""
    width, height = plan.halved[-1] if plan.halved else size
    scale_y, scale_x = height / plan.scaled[1], width / plan.scaled[0]
    square = [
        (plan.top * scale_y, plan.left * scale_x),
        ((plan.top + image_size) * scale_y, (plan.left + image_size) * scale_x),
    ]
    return np.array([halved[::-1] for halved in plan.halved] + square, np.float32)


def _pipeline(device, image_size, halvings, end):
    """From encoded bytes to squares of one size, for pictures halved equally often."""
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"

    @pipeline_def(batch_size=AT_ONCE, num_threads=THREADS, device_id=device.index, prefetch_queue_depth=1)
    def define():
        encoded = fn.external_source(
            name="encoded", dtype=types.UINT8, ndim=1, no_copy=True
        )  # bytes of a run outlive it
        plan = fn.external_source(name="plan", dtype=types.FLOAT, ndim=2)
        pictures = fn.decoders.image(
            encoded, device="mixed" if on_gpu else "cpu", output_type=types.RGB, jpeg_fancy_upsampling=True
        )
        size = pictures.shape()
        for k in range(halvings):  # the middle of two pixels, between which linear interpolation is their mean
            pictures = fn.resize(pictures, size=plan[k], interp_type=types.INTERP_LINEAR, antialias=False)
        start, stop = plan[halvings], plan[halvings + 1]
        if end == "resize":
            pictures = fn.resize(
                pictures, size=[image_size] * 2, roi_start=start, roi_end=stop, interp_type=types.INTERP_CUBIC
            )
        elif end == "cut":
            pictures = fn.slice(
                pictures, start, stop - start, axes=(0, 1), normalized_anchor=False, normalized_shape=False
            )
        return pictures, size

    built = define()
    _built.add(built)
    return built


# A forked process that let go of a pipeline would wait for ever for its threads, which do not run there: it keeps all.
_built, _inherited = weakref.WeakSet(), []
os.register_at_fork(before=lambda: _inherited.extend(_built), after_in_parent=_inherited.clear)
