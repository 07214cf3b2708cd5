"""What a run writes down as it goes: metrics.jsonl, log.txt and the progress bar."""

import json
import os
import sys

from tqdm import tqdm

from lfm_fast._terminal import stop_printing


class Journal:
    """The run's record on rank 0; on other ranks every method does nothing.

    metrics.jsonl holds one JSON object per line. A line that cannot be written (a full disk) is kept and tried again
    with the next one; the run goes on.
    """

    def __init__(self, folder, active=True):
        self.folder, self.active = folder, active
        self._unwritten, self._warned, self._bar = [], False, None

    def open_bar(self, total, initial):
        """A bar where someone watches: in a terminal. Elsewhere lines do the same."""
        if self.active and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, smoothing=0.05)

    def advance(self):
        if self._bar is not None:
            self._bar.update(1)

    def progress(self, values, total):
        """Show a line of metrics: in the bar where there is one, else as a line of text; log.txt gets it either way."""
        if not self.active:
            return
        left = (total - values["step"]) / values["steps_per_s"]
        shown = {
            "loss": f"{values['loss']:.4f}",
            "steps/s": f"{values['steps_per_s']:.2f}",
            "images/s": f"{values['images_per_s']:.0f}",
            "data": f"{values['data_share']:.1%}",
            **({"MFU": f"{values['mfu']:.1%}"} if "mfu" in values else {}),
            "memory": f"{values['memory_gb']:.1f} GB",
        }
        if self._bar is not None:
            self._bar.set_postfix(shown)
        rest = ", ".join(f"{name} {value}" for name, value in shown.items())
        line = f"step {values['step']}/{total}: {rest}, left {tqdm.format_interval(left)}"
        self.say(line, show=self._bar is None)

    def close(self):
        if self._bar is not None:
            self._bar.close()

    def say(self, line, show=True):
        """Print a line and keep it in log.txt."""
        if not self.active:
            return
        if show:
            _show(line)
        self.attempt("log.txt", lambda: _append(self.folder / "log.txt", line + "\n"), quiet=True)

    def metrics(self, **values):
        if not self.active:
            return
        self._unwritten.append(json.dumps(values))
        if self.attempt("metrics.jsonl", self._write_metrics, quiet=self._warned):
            self._unwritten, self._warned = [], False
        else:
            self._warned = True

    def _write_metrics(self):
        _append(self.folder / "metrics.jsonl", "".join(line + "\n" for line in self._unwritten))

    def attempt(self, what, write, quiet=False):
        """Run `write()`; a full disk or a missing right is one printed sentence, not the end of the run."""
        try:
            write()
        except OSError as error:
            if not quiet:
                _show(f"Could not write {what}: {error.strerror or error}. Training goes on.")
            return False
        return True


def _show(line):
    """Print a line; a reader who has gone (`| head`) or a full disk behind `> file` is not the end of the run."""
    try:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        stop_printing()


def _append(path, text):
    """Append all of `text` or, if that fails, nothing."""
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        data = text.encode()
        try:
            written = file.write(data)
            if written < len(data):
                file.write(data[written:])  # a disk that took a part raises the reason now
        except OSError:
            file.truncate(size)
            raise


def read_metrics(folder):
    """All whole lines of metrics.jsonl as dicts; a line cut by a kill is left out.

    Raises ValueError for a line that is JSON and no line of metrics: somebody else wrote this file.
    """
    path = folder / "metrics.jsonl"
    lines = []
    texts = path.read_text(errors="replace").splitlines() if path.exists() else ()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if not (isinstance(line, dict) and isinstance(line.get("step"), int) and _is_number(line.get("seconds", 0))):
            raise ValueError(f"{path}, line {number}: this is no line of metrics (an object with its step)")
        lines.append(line)
    return lines


def _is_number(value):
    return isinstance(value, (int, float))
