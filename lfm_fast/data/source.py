"""What training and encoding read pictures from."""

from dataclasses import dataclass, field

import torch


@dataclass
class Report:
    """Files that could not be used, each with its reason, and files that were changed on the way in."""

    skipped: list[tuple[str, str]] = field(default_factory=list)
    converted: list[tuple[str, str]] = field(default_factory=list)

    def summary(self, names: int = 10) -> str:
        """One sentence per reason with the names of its files (the first `names`), or one saying that all is well."""
        lines = _sentences("Skipped", self.skipped, names) + _sentences("Converted", self.converted, names)
        return "\n".join(lines) if lines else "Every image was read as it is."


def _sentences(verb, entries, limit) -> list[str]:
    by_reason = {}
    for name, reason in entries:
        by_reason.setdefault(reason, []).append(name)
    sentences = []
    for reason, names in by_reason.items():
        shown = ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
        count = "1 image" if len(names) == 1 else f"{len(names)} images"
        sentences.append(f"{verb} {count} ({reason}): {shown}.")
    return sentences


class ImageSource:
    """Square RGB pictures with a label each.

    Attributes: labels (N,) int64; class_names and names, lists of str; image_size, the side in pixels; flip, whether
    a horizontal mirror is a fair augmentation; report, a `Report`; name, what provenance calls this source; crop, how
    pictures are cut to size ("centre": box halvings, bicubic, the middle square); decoded_by, who makes pixels of files
    (a name of `lfm_fast.data.decoders`; each rounds otherwise), or None where there are none. Subclasses implement
    `load`.
    """

    name = "images"
    flip = False
    crop = "centre"
    decoded_by = None

    def __init__(self, image_size, labels, class_names, names, report=None):
        self.image_size = int(image_size)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.class_names = list(class_names)
        self.names = list(names)
        self.report = report if report is not None else Report()

    def __len__(self):
        return len(self.names)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def load(self, position: int) -> torch.Tensor:
        """Picture number `position` as (3, H, W) uint8."""
        raise TypeError(f"{type(self).__name__} must implement load(position)")

    def batch(self, positions) -> torch.Tensor:
        """The pictures at `positions` as (B, 3, H, W) uint8."""
        positions = [int(i) for i in positions]
        if not positions:
            return torch.empty(0, 3, self.image_size, self.image_size, dtype=torch.uint8)
        return torch.stack([self.load(i) for i in positions])


def check_num_classes(source, num_classes: int) -> None:
    """Refuse, before any work, labels that a network with `num_classes` classes has no row for.

    Raises:
        ValueError: a label of the source is num_classes or more.
    """
    highest = int(source.labels.max()) if len(source.labels) else -1
    if highest >= num_classes:
        raise ValueError(
            f"The data has labels up to {highest} ({len(source.class_names)} classes), but num_classes={num_classes} "
            f"allows 0 to {num_classes - 1}: pass num_classes={len(source.class_names)}."
        )
