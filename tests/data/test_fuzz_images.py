"""Hundreds of damaged image files: each is read or skipped with a reason, in bounded time, and no label moves."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

pytestmark = [pytest.mark.slow, pytest.mark.fuzz]

ROOT = Path(__file__).parents[2]
FULL = os.environ.get("LFM_FAST_SAMPLE") == "full"
MUTANTS = 6000 if FULL else 400
SECONDS = 1200 if FULL else 120

# in a process of its own, so that a decoder that crashes or never ends fails the test instead of taking it along
READ_ALL = """
import json, sys
from lfm_fast.data import open_images
source = open_images(sys.argv[1], 16, small="upscale")
sizes = {tuple(source.batch([i])[0].shape) for i in range(len(source))}
again = open_images(sys.argv[1], 16, small="upscale")
assert again.names == source.names and again.report.skipped == source.report.skipped
print(json.dumps([source.names, source.labels.tolist(), source.class_names, source.report.skipped, list(sizes)]))
"""


def seeds(folder):
    """One healthy file per format and colour mode: [(suffix, bytes)]."""
    generator = np.random.default_rng(0)
    smooth = np.kron(generator.integers(0, 256, (6, 8, 3)), np.ones((6, 6, 1))).astype(np.uint8)
    picture = Image.fromarray(smooth)
    kinds = [(suffix, picture) for suffix in ("png", "jpg", "webp", "bmp", "gif", "tif", "ppm", "tga", "ico")]
    kinds += [("png", picture.convert(mode)) for mode in ("RGBA", "LA", "L", "P", "1", "I;16")]
    kinds += [("jpg", picture.convert("CMYK")), ("tif", picture.convert("I;16")), ("tif", picture.convert("CMYK"))]
    kinds += [(suffix, picture) for suffix, codec in (("jp2", "jpg_2000"), ("avif", "avif")) if features.check(codec)]
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for k, (suffix, image) in enumerate(kinds):
        path = folder / f"seed{k}.{suffix}"
        image.save(path, **({"exif": exif} if suffix in ("jpg", "png", "webp") else {}))
        found.append((suffix, path.read_bytes()))
    return found


def mutate(content: bytes, generator) -> bytes:
    data = bytearray(content)
    for _ in range(int(generator.integers(1, 5))):
        place = (
            int(generator.integers(len(data)))
            if generator.random() < 0.5
            else int(generator.integers(min(64, len(data))))
        )
        kind = generator.integers(6)
        if kind == 0:
            data[place] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            data[place] = int(generator.choice([0, 1, 127, 128, 255]))
        elif kind == 2:
            data[place : place + 4] = generator.choice(
                [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"]
            )
        elif kind == 3:
            del data[place : place + int(generator.integers(1, 40))]
        elif kind == 4:
            data[place:place] = generator.integers(0, 256, int(generator.integers(1, 40))).astype(np.uint8).tobytes()
        else:
            del data[max(place, 1) :]
        if not data:
            break
    return bytes(data)


def test_damaged_images_are_read_or_skipped(tmp_path):
    seed = int(np.random.SeedSequence().generate_state(1)[0]) if FULL else 20240607
    generator = np.random.default_rng(seed)
    healthy = seeds(tmp_path)
    folder = tmp_path / "images"
    expected = {}
    for k in range(MUTANTS):
        suffix, content = healthy[k % len(healthy)]
        name = f"class{k % 3}/{k:05d}.{suffix}"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = k % 10 == 0
        path.write_bytes(content if whole else mutate(content, generator))
        expected[name] = (k % 3, whole)
    command = [sys.executable, "-c", READ_ALL, str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, cwd=ROOT)
    assert run.returncode == 0, f"seed {seed}: {run.stderr[-2000:]}"
    names, labels, class_names, skipped, sizes = json.loads(run.stdout.splitlines()[-1])
    assert class_names == ["class0", "class1", "class2"]
    assert sizes == [[3, 16, 16]]
    assert dict(zip(names, labels)) == {name: expected[name][0] for name in names}
    assert sorted([*names, *(name for name, _ in skipped)]) == sorted(expected), f"seed {seed}"
    assert all(reason for _, reason in skipped)
    assert not [name for name, _ in skipped if expected[name][1]], "a healthy file was skipped"
    assert len(skipped) > MUTANTS // 10  # the mutations do damage
