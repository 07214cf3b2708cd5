"""The sampling form of a DiT: what time and label alone decide is computed before the loop, and read in it."""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_BYTES = 512 * 2**20


class Prepared:
    """A DiT at times and labels known beforehand: prepared(k, z, y) = model(times[k], z, y). `DiT.prepare` makes it.

    A table holds every modulation of all times and distinct labels; a call reads its rows. Where that is longer than
    the budget, it holds as many of the coming times as fit, and is made anew for the time that is not among them.
    """

    def __init__(self, model, times: Tensor, y: Tensor | None, unlabelled: bool, max_bytes: int):
        device = model.pos_embed.device
        self.model, self.times = model, times.to(device)
        self.default = model.num_labels - 1  # what y=None means
        self.parts, self.max_bytes = len(model.blocks) + 1, max_bytes
        self.labels = None
        self.relabel(y, unlabelled)

    def relabel(self, y: Tensor | None, unlabelled: bool, distinct: bool = True) -> None:
        """Prepare for other labels than before; where they are the same ones, the table stays.

        distinct: of equal labels one is prepared, which the host has to wait for. Otherwise each is, and anew: a table
        whose size is known beforehand, as a CUDA graph wants it. ValueError for labels that the network does not have.
        """
        model, device = self.model, self.times.device
        if y is not None:
            model.check_labels(y, y.numel())
        known = [] if y is None else [y.to(device, torch.int64)]
        known += [torch.full((1,), self.default, device=device)] if unlabelled or y is None else []
        labels = torch.cat(known)
        if distinct:
            labels = labels.unique()
            if self.labels is not None and torch.equal(labels, self.labels):
                return
        self.labels = labels  # (L,)
        places = torch.arange(len(labels), device=device)
        self.place = torch.full((model.num_labels,), -1, device=device).index_copy(0, labels, places)
        width = 6 * model.hidden_size * model.pos_embed.element_size()
        # the parts, one by one, and the table made of them exist at once
        self.times_at_once = max(1, self.max_bytes // (2 * self.parts * len(labels) * width))
        self.parts_start = len(labels) * torch.arange(self.parts, device=device)[:, None]
        self.first, self.table = 0, None  # the number of the table's first time, and (times, parts L, 6 D)

    def __call__(
        self, k: int, z: Tensor, y: Tensor | None = None, samples: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """Velocity at times[k] of latents z (B, C, H, W) under labels y (B,), as the model gives it.

        samples (R,) int64: the sample that each row of the result is of, with y (R,); any number of rows of a sample,
        whose patches are embedded once. None: one row of each. condition (B, K, H, W): one entry of each latent.

        Raises ValueError for what the model would refuse, a k outside the times, and labels that were not prepared.
        """
        z = self.model.joined(z, condition)
        if not 0 <= k < len(self.times):
            raise ValueError(f"k is {k}, but {len(self.times)} times were prepared: give 0 to {len(self.times) - 1}.")
        places = self._places(y, len(z) if samples is None else len(samples))
        with self.model.products():
            x = self.model.tokens(z)
            if samples is not None:
                x = x.index_select(0, samples)
            # one look-up for all parts, each of which comes out contiguous, as the model's own would be
            modulations = F.embedding(self.parts_start + places, self._at(k))  # (parts, R, 6 D)
            return self.model.trunk(x, list(modulations.unbind(0)))

    def _places(self, y: Tensor | None, count: int) -> Tensor:
        """Where the labels stand among the distinct ones, (R,)."""
        if y is None:
            y = torch.full((count,), self.default, device=self.place.device)
        else:
            self.model.check_labels(y, count)
        places = self.place.index_select(0, y)
        if places.device.type == "cpu" and count and int(places.min()) < 0:
            missing = int(y[places.argmin()])
            raise ValueError(f"the label {missing} was not prepared: name it in prepare(times, y), or unlabelled=True.")
        return places

    @torch.no_grad()
    def _at(self, k: int) -> Tensor:
        """The modulations of times[k], (parts L, 6 D)."""
        if self.table is None or not self.first <= k < self.first + len(self.table):
            self.table = None  # its memory is free for the next
            self.first, self.table = k, self._computed(self.times[k : k + self.times_at_once])
        return self.table[k - self.first]

    def _computed(self, times: Tensor) -> Tensor:
        count = len(self.labels)
        parts = self.model.modulations(times.repeat_interleave(count), self.labels.repeat(len(times)))
        table = torch.stack([part.unflatten(0, (len(times), count)) for part in parts], dim=1)
        return table.flatten(1, 2)
