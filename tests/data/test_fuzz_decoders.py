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
MUTANTS = 16_000 if FULL else 2_000
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
by_dali = [0]
real = DaliDecoder._run
def counted(self, members):
    found = real(self, members)
    by_dali[0] += 0 if found is None else len(members)
    return found
DaliDecoder._run = counted

def compare(expected, found, what):
    if isinstance(expected, str) != isinstance(found, str):
        disagreed.append([what, expected if isinstance(expected, str) else "a picture", str(found)[:60]])
    elif not isinstance(expected, str) and (off := float((expected.float() - found.float()).abs().mean())) > 2:
        differing.append([what, off])

refused, disagreed, differing = 0, [], []
for first in range(0, count, 8):
    contents = [mutate(healthy[k % len(healthy)], generator) for k in range(first, first + 8)]
    expected = [verdict(pil, content) for content in contents]
    for k, (content, one) in enumerate(zip(contents, expected)):
        compare(one, verdict(dali, content), [first + k, kinds[(first + k) % len(kinds)][0]])
    bad = [k for k, one in enumerate(expected) if isinstance(one, str)]
    refused += len(bad)
    good = [k for k in range(8) if k not in bad]
    if good:  # beside each other, and with one that cannot be decoded among them
        for k, picture in zip(good, dali.decode([contents[k] for k in good], 32)):
            compare(expected[k], picture, [first + k, "together"])
    if bad:
        try:
            dali.decode(contents, 32)
            disagreed.append([first, "a batch with a damaged picture was decoded"])
        except UndecodableImage as error:
            if error.place != bad[0]:
                disagreed.append([first, f"place {error.place} was named, not {bad[0]}"])
print(json.dumps([refused, by_dali[0], disagreed, differing]))
"""


def test_both_decoders_judge_damage_alike():
    seed = int.from_bytes(os.urandom(4), "little") if FULL else 20260101
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-c", DECODE_ALL, str(seed), str(MUTANTS)]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=ROOT, env=environment
    )
    assert run.returncode == 0, f"seed {seed}: {run.stderr[-2000:]}"
    refused, by_dali, disagreed, differing = json.loads(run.stdout.splitlines()[-1])
    assert disagreed == [], f"seed {seed}"
    assert differing == [], f"seed {seed}"
    assert refused > MUTANTS // 10  # the mutations do damage
    assert by_dali > MUTANTS // 10  # and DALI is asked at all
