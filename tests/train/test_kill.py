"""kill -9 at random instants: no finished checkpoint is lost, and the curve is that of an uninterrupted run."""

import os
import random
import signal
import time

import pytest
import torch
from tiny_run import Run, flags

from lfm_fast.train import resume
from lfm_fast.train.journal import read_metrics

STEPS, EVERY = 160, 2


def arguments(output):
    return flags(output=output, steps=STEPS, checkpoint_every=EVERY, log_every=2, schedule="cosine", keep_checkpoints=2)


def whole_checkpoints(folder):
    """Steps of the checkpoints that read without fault; every file that has a checkpoint's name must."""
    for path in resume.run_checkpoints(folder):
        resume.read_verified(path)
    return [int(path.stem) for path in resume.run_checkpoints(folder)]


def kill_once(run, folder, generator):
    """Kill at an instant between the process's first moments and what is about a fifth of the run's length."""
    newest = resume.newest_step(folder)
    run.wait_for("Training DiT-Tiny")
    time.sleep(generator.uniform(0.0, 0.4))
    if not run.process.is_alive():
        return False
    run.signal(signal.SIGKILL)
    assert run.status() == -signal.SIGKILL
    found = whole_checkpoints(folder)
    assert max(found, default=0) >= newest
    return True


@pytest.mark.slow
@pytest.mark.kill
def test_killed_at_random_instants(tmp_path):
    quick = os.environ.get("LFM_FAST_SAMPLE", "quick") == "quick"
    seed, wanted = (0, 4) if quick else (random.SystemRandom().randrange(2**32), 20)
    generator, kills, starts = random.Random(seed), 0, 0
    folder = tmp_path / "killed" / "000-DiT-Tiny"
    while kills < wanted and starts < 4 * wanted:
        starts += 1
        run = Run(arguments(tmp_path / "killed"), tmp_path / f"out{starts}.txt")
        if not kill_once(run, folder, generator):
            # finished before the kill: cut it back to its beginning, so that there is something to kill
            assert run.status() == 0
            for path in resume.run_checkpoints(folder):
                path.unlink()
        else:
            kills += 1
    assert kills == wanted, f"seed {seed}"
    last = Run(arguments(tmp_path / "killed"), tmp_path / "last.txt")
    assert last.status() == 0, f"seed {seed}: {last.text()}"
    assert "Skipping" not in last.text()
    whole = Run(arguments(tmp_path / "whole"), tmp_path / "whole.txt")
    assert whole.status() == 0

    reference = tmp_path / "whole" / "000-DiT-Tiny"
    assert os.listdir(tmp_path / "killed") == ["000-DiT-Tiny"], f"seed {seed}"
    assert curve(folder) == curve(reference), f"seed {seed}"
    assert [line["step"] for line in read_metrics(folder)] == list(range(2, STEPS + 1, 2)), f"seed {seed}"
    one, other = (resume.read_verified(resume.run_checkpoints(f)[0])[0] for f in (folder, reference))
    assert all(torch.equal(one[name], other[name]) for name in other), f"seed {seed}"
    assert not list(folder.glob("**/*.partial")), f"seed {seed}"


def curve(folder):
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in read_metrics(folder)]
