"""How long a fresh process takes: to import, to its first image, to its first training step."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.names import AGAIN, FAST
from benchmarks.workloads import Contender, Workload

ROOT = Path(__file__).resolve().parents[1]
IMPORT_TORCH, COLD = "import torch", "cold: nothing cached"
IMAGE = ("-m", "lfm_fast.cli", "sample", "--num-images", "1", "--num-steps", "10", "--output", "{out}/picture.png")
STEP = ("-m", "lfm_fast.cli", "train", "--data", "embedded", "--autoencoder", "embedded", "--image-size", "64")
STEP += ("--model", "DiT-Emoji/2", "--max-items", "64", "--batch-size", "16", "--steps", "1", "--sample-every", "0")
STEP += ("--compile", "off", "--output", "{out}/results", "--resume", "never", "--cache-latents", "{cache}/latents")


class Starting(Workload):
    """A command in a process of its own, from its start to its end.

    Warm, the package's cache folder is filled; cold, it is new each time. Files that the system holds in memory stay
    there either way.
    """

    measures_memory = False

    def __init__(self, command: tuple[str, ...], rounds: int):
        self.command, self.rounds = command, rounds
        self.warm = Path(tempfile.mkdtemp(prefix="lfm-fast-warm-"))

    def __del__(self):
        shutil.rmtree(self.warm, ignore_errors=True)

    def contenders(self):
        def run():
            run_fresh(self.command, self.warm)

        run()  # fills the cache
        return {FAST: Contender(run), AGAIN: Contender(run), COLD: Contender(self._cold)}

    def _cold(self):
        with tempfile.TemporaryDirectory() as folder:
            run_fresh(self.command, folder)

    def largest_error(self, errors):
        return 0.0


class Importing(Starting):
    """`import lfm_fast` beside `import torch`, which is most of it."""

    def __init__(self, rounds: int):
        super().__init__(("-c", "import lfm_fast, torch; lfm_fast.sample, lfm_fast.create_model"), rounds)

    def contenders(self):
        ours = super().contenders()
        torch = Contender(lambda: run_fresh(("-c", "import torch"), self.warm))
        return {FAST: ours[FAST], AGAIN: ours[AGAIN], IMPORT_TORCH: torch}


def run_fresh(command: tuple[str, ...], cache) -> None:
    """Run Python on `command`, with {out} and {cache} filled in; what it and its compilers keep goes to `cache`."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = {"LFM_FAST_CACHE": "", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}
    with tempfile.TemporaryDirectory() as out:
        environment = {**os.environ, **{name: os.path.join(cache, folder) for name, folder in kept.items()}}
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        words = [word.format(out=out, cache=cache) for word in command]
        done = subprocess.run([sys.executable, *words], env=environment, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
