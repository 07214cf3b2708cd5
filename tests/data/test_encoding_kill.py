"""kill -9 of encoders at random instants: what has a shard's name is whole, and in the end nothing is missing."""

import os
import random
import signal
import time

import pytest
from encoding_ranks import SETTINGS, context
from small_images import Pixels, Pooling, files_of

from lfm_fast.data.encoding import encode_images
from lfm_fast.data.shards import is_whole

COUNT = 60


class Slow(Pooling):
    def encode(self, images):
        time.sleep(0.004)
        return super().encode(images)


def encode(folder, notes):
    os.environ["LFM_FAST_CACHE"] = notes
    encode_images(Pixels(COUNT), Slow(), folder, **SETTINGS)


@pytest.mark.slow
@pytest.mark.kill
def test_killed_at_random_instants(tmp_path):
    full = os.environ.get("LFM_FAST_SAMPLE") == "full"
    seed, wanted = (random.SystemRandom().randrange(2**32), 100) if full else (0, 12)
    generator, kills, starts, midway = random.Random(seed), 0, 0, 0
    notes = os.environ["LFM_FAST_CACHE"]
    encode_images(Pixels(COUNT), Pooling(), tmp_path / "whole", **SETTINGS)
    expected = files_of(tmp_path / "whole")
    folder = tmp_path / "killed"
    while kills < wanted and starts < 8 * wanted:
        starts += 1
        process = context().Process(target=encode, args=(folder, notes), daemon=True)
        process.start()
        time.sleep(generator.uniform(0.05, 0.35))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            midway += not (folder / "stats.json").exists()
            standing = [path for path in folder.glob("*.safetensors") if not path.name.startswith(".")]
            assert all(is_whole(path) and path.read_bytes() == expected[path.name] for path in standing), f"seed {seed}"
            continue
        assert process.exitcode == 0, f"seed {seed}"
        assert files_of(folder) == expected, f"seed {seed}"
        for path in generator.sample(sorted(folder.iterdir()), 7):  # so that there is something to kill
            path.unlink()
    assert kills == wanted, f"seed {seed}"
    assert midway > wanted // 3, f"seed {seed}"  # they met it at work
    encode_images(Pixels(COUNT), Pooling(), folder, **SETTINGS)
    assert files_of(folder) == expected, f"seed {seed}"
