"""Thousands of damaged JPEGs, PNGs and WebPs through Pillow and DALI: one verdict, and the same picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lfm_fast.data.decoders import dali_is_there

pytestmark = [
    pytest.mark.slow,
    pytest.mark.fuzz,
    pytest.mark.skipif(not dali_is_there(), reason="DALI is not installed"),
]

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("LFM_FAST_SAMPLE") == "full"
MUTANTS = 12_000 if FULL else 1_500
SECONDS = 1800 if FULL else 300

# in a process of its own, so that a decoder that crashes or never ends fails the test instead of taking it along
DECODE_ALL = """
import io, json, sys, warnings
import numpy as np
import torch
from PIL import Image
from data.test_fuzz_images import mutate
from lfm_fast.data import dali as module
from lfm_fast.data.dali import DaliDecoder
from lfm_fast.data.decoders import PillowDecoder, UndecodableImage

warnings.simplefilter("ignore")
module.PATIENCE = 10**9
seed, count = int(sys.argv[1]), int(sys.argv[2])
generator = np.random.default_rng(seed)
smooth = np.kron(generator.integers(0, 256, (6, 8, 3)), np.ones((12, 12, 1))).astype(np.uint8)
kinds = [("jpeg", {}), ("jpeg", {"progressive": True}), ("jpeg", {"subsampling": 0, "restart_marker_blocks": 2})]
kinds += [("png", {}), ("webp", {}), ("webp", {"lossless": True})]
exif = Image.Exif()
exif[0x0112] = 6
kinds += [("jpeg", {"exif": exif})]
healthy = []
for kind, options in kinds:
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, kind, **options)
    healthy.append(file.getvalue())

def verdict(decoder, content):
    try:
        return decoder.decode([content], 32)[0]
    except UndecodableImage as error:
        return str(error)

pil, dali = PillowDecoder(), DaliDecoder()
ran = [0]
real = DaliDecoder._run
def counted(self, *arguments):
    found = real(self, *arguments)
    ran[0] += found is not None
    return found
DaliDecoder._run = counted
refused, disagreed, differing, decoded_by_dali = 0, [], [], 0
for k in range(count):
    content = mutate(healthy[k % len(healthy)], generator)
    expected, before = verdict(pil, content), ran[0]
    found = verdict(dali, content)
    refused += isinstance(expected, str)
    decoded_by_dali += ran[0] > before
    if isinstance(expected, str) != isinstance(found, str):
        disagreed.append([k, expected if isinstance(expected, str) else "a picture", str(found)[:60]])
    elif not isinstance(expected, str):
        off = float((expected.float() - found.float()).abs().mean())
        if off > 2:
            differing.append([k, off, kinds[k % len(kinds)][0]])
print(json.dumps([refused, decoded_by_dali, disagreed, differing]))
"""


def test_both_decoders_judge_damage_alike():
    seed = int.from_bytes(os.urandom(4), "little") if FULL else 20260101
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", DECODE_ALL, str(seed), str(MUTANTS)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=ROOT, env=environment
    )
    assert run.returncode == 0, f"seed {seed}: {run.stderr[-2000:]}"
    refused, decoded_by_dali, disagreed, differing = json.loads(run.stdout.splitlines()[-1])
    assert disagreed == [], f"seed {seed}"
    assert differing == [], f"seed {seed}"
    assert refused > MUTANTS // 10  # the mutations do damage
    assert decoded_by_dali > MUTANTS // 10  # and DALI is asked at all
