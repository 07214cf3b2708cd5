"""Thousands of damaged caches, of ours and of others: read as they were, or refused in a sentence, in bounded time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.fuzz]

HERE = Path(__file__).parent
FULL = os.environ.get("LFM_FAST_SAMPLE") == "full"
MUTANTS = 4000 if FULL else 300  # of each layout
SECONDS = 1500 if FULL else 150

# in a process of its own, so that a reader that crashes or never ends fails the test instead of taking it along
READ_ALL = """
import json, resource, sys
from pathlib import Path
import numpy as np, torch
from lfm_fast.data.encoding import encode_images
from lfm_fast.data.foreign_latents import open_latents
from small_images import Pixels, Pooling
from test_foreign_latents import fast_dit, lightningdit
from test_fuzz_images import mutate

layout, folder, mutants, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if layout == "ours":
    encode_images(Pixels(), Pooling(), folder, shard_size=7, flip=True, progress=False)
else:
    (lightningdit if layout == "lightningdit" else fast_dit)(folder)
generator = np.random.default_rng(seed)
files = sorted(path for path in folder.rglob("*") if path.is_file())

def read():
    scaling = None if layout != "lightningdit" else "stats" if generator.random() < 0.5 else 1.0
    cache = open_latents(folder, scaling=scaling, verify=True)
    items = torch.arange(cache.num_items)
    flips = torch.ones(len(items), dtype=torch.bool) if cache.has_flip else None
    return [cache.num_items, cache.labels.tolist(), cache.class_names, cache.mean.tolist(), cache.std.tolist()], [
        part for part in (*cache.read(items), *cache.read(items, flips)) if part is not None
    ]

resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))  # a damaged number must not ask for all the memory
told, latents = read()
counts = {"read": 0, "refused": 0, "changed": 0}
for number in range(mutants):
    path = files[int(generator.integers(len(files)))]
    content = path.read_bytes()
    path.write_bytes(mutate(content, generator))
    try:
        found_told, found = read()
        counts["read"] += 1
        same = len(found) == len(latents) and all(map(torch.equal, found, latents)) and found_told == told
        counts["changed"] += not same
        # the numbers of items, and their shapes, are always the ones that the labels belong to
        assert found_told[0] == len(found_told[1]) and all(len(part) == found_told[0] for part in found), number
    except ValueError as error:
        assert chr(10) not in str(error) and str(folder) in str(error), (number, error)
        counts["refused"] += 1
    path.write_bytes(content)
read()
print(json.dumps(counts))
"""


@pytest.mark.parametrize("layout", ["ours", "lightningdit", "fast-dit"])
def test_damaged_caches(tmp_path, layout):
    seed = int.from_bytes(os.urandom(4), "little") if FULL else 20240607
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)])}
    command = [sys.executable, "-c", READ_ALL, layout, str(tmp_path / "cache"), str(MUTANTS), str(seed)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=environment)
    assert run.returncode == 0, f"seed {seed}: {run.stderr[-2000:]}"
    counts = json.loads(run.stdout.splitlines()[-1])
    assert counts["read"] + counts["refused"] == MUTANTS
    assert counts["refused"] > MUTANTS // 4  # the mutations do damage
    if layout == "ours":
        assert counts["changed"] == 0, f"seed {seed}: damage was not seen"
