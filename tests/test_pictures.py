import builtins
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lfm_fast import pictures


def flat(value, count=1, side=4):
    return np.full((count, 3, side, side), value, np.uint8)


def test_every_image_stands_at_its_place():
    images = np.stack([np.full((3, 4, 5), 20 * k, np.uint8) for k in range(5)])
    sheet = np.array(pictures.grid(images, 3, padding=2))
    assert sheet.shape == (2 + 2 * 6, 2 + 3 * 7, 3)
    for k in range(5):
        top, left = 2 + 6 * (k // 3), 2 + 7 * (k % 3)
        assert (sheet[top : top + 4, left : left + 5] == 20 * k).all()
        sheet[top : top + 4, left : left + 5] = 255
    assert (sheet == 255).all()


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_floats_are_rounded_and_clipped(make):
    images = np.zeros((1, 3, 2, 2), np.float32)
    images[0, :, 0, 0], images[0, :, 0, 1], images[0, :, 1, 0] = 0.5, 1.05, -0.05
    pixels = pictures.to_uint8(make(images))
    assert pixels.shape == (1, 2, 2, 3)
    assert pixels[0, :, :, 0].tolist() == [[128, 255], [0, 0]]


def test_low_precision_tensors_are_drawn():
    assert pictures.to_uint8(torch.ones(1, 3, 2, 2, dtype=torch.bfloat16)).max() == 255
    assert pictures.to_uint8(torch.full((1, 3, 2, 2), 7, dtype=torch.uint8)).max() == 7


def test_captions_take_room_and_leave_ink_beside_the_images():
    plain = pictures.grid(flat(0, 6, 32), 3)
    captioned = pictures.grid(
        flat(0, 6, 32), 3, captions=["cats", "dogs"], column_captions=["a", "b", "long words here"]
    )
    assert captioned.width > plain.width
    assert captioned.height > plain.height
    sheet = np.array(captioned)
    left, top = captioned.width - plain.width, captioned.height - plain.height
    assert np.array_equal(sheet[top:, left:], np.array(plain))
    for row in range(2):  # each row's caption stands beside that row
        assert sheet[top + 34 * row : top + 34 * (row + 1), :left].min() < 128
    for column in range(3):
        assert sheet[:top, left + 34 * column : left + 34 * (column + 1)].min() < 128
    assert (sheet[:, 0] == 255).all()  # no caption is cut at the edge
    assert (sheet[0] == 255).all()


def test_scale_enlarges_pixel_by_pixel():
    sheet = np.array(pictures.grid(np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2), scale=3, padding=0))
    assert sheet.shape == (6, 6, 3)
    assert sheet[::3, ::3, 0].tolist() == [[0, 1], [2, 3]]
    assert (sheet[:3, :3] == sheet[0, 0]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"images": flat(0, 0)}, "no image"),
        ({"images": np.zeros((3, 4, 4))}, r"\(3, 4, 4\)"),
        ({"images": np.zeros((1, 1, 4, 4))}, r"\(1, 1, 4, 4\)"),
        ({"images": np.full((1, 3, 4, 4), np.nan)}, "not finite"),
        ({"images": np.full((1, 3, 4, 4), -1.0)}, r"range from -1 to -1; pass them in \[0, 1\]"),
        ({"images": np.full((1, 3, 4, 4), 255.0)}, "range from 255"),
        ({"images": flat(0, 4), "columns": 2, "captions": ["one"]}, "captions has 1 captions for 2 places"),
        ({"images": flat(0, 4), "columns": 2, "column_captions": ["1"] * 3}, "column_captions has 3"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments, words):
    with pytest.raises(ValueError, match=words):
        pictures.grid(**arguments)


def test_panels_stand_side_by_side_under_their_titles():
    first, second = Image.new("RGB", (60, 40), (255, 0, 0)), Image.new("RGB", (30, 80), (0, 0, 255))
    sheet = np.array(pictures.side_by_side([("first panel", first), ("a rather long title", second)]))
    red = (sheet == (255, 0, 0)).all(-1)
    blue = (sheet == (0, 0, 255)).all(-1)
    assert (red.sum(), blue.sum()) == (60 * 40, 30 * 80)
    assert red.nonzero()[1].max() < blue.nonzero()[1].min()
    assert red.nonzero()[0].min() == blue.nonzero()[0].min()
    assert sheet[: red.nonzero()[0].min()].min() < 128  # the titles
    with pytest.raises(ValueError, match="no panel"):
        pictures.side_by_side([])


def test_nearest_is_the_smallest_euclidean_distance():
    generator = np.random.default_rng(0)
    references = generator.integers(0, 256, (70, 3, 6, 6)).astype(np.uint8)
    samples = generator.integers(0, 256, (9, 3, 6, 6)).astype(np.uint8)
    distance = ((samples[:, None].astype(float) - references[None].astype(float)) ** 2).sum((2, 3, 4))
    assert pictures.nearest(samples, references, block=16).tolist() == distance.argmin(1).tolist()
    assert pictures.nearest(references[[5, 69, 0]], references, block=16).tolist() == [5, 69, 0]
    with pytest.raises(ValueError, match="4x4 and references 6x6"):
        pictures.nearest(flat(0), references)
    with pytest.raises(ValueError, match="no reference"):
        pictures.nearest(samples, references[:0])


def test_each_sample_stands_above_its_nearest_reference():
    references = np.concatenate([flat(value) for value in (0, 100, 200)])
    samples = np.concatenate([flat(value) for value in (190, 10, 95)])
    sheet = np.array(pictures.samples_and_nearest(samples, references, pairs_per_row=2))
    values = [v for v in np.unique(sheet.reshape(-1, 3), axis=0)[:, 0].tolist() if v in (0, 10, 95, 100, 190, 200)]
    assert values == [0, 10, 95, 100, 190, 200]
    for sample, reference in ((190, 200), (10, 0), (95, 100)):
        row, column = _place(sheet, sample)
        assert _place(sheet, reference) == (row + 6, column)  # one row further down, in the same column


def _place(sheet, value):
    mask = (sheet == value).all(-1)
    for row, column in np.argwhere(mask):
        block = mask[row : row + 4, column : column + 4]
        if block.size == 16 and block.all():  # the captions' soft edges are thinner than this
            return row, column
    raise AssertionError(f"no block of {value}")


def write_metrics(path, records, tail=""):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


def test_the_loss_curve_is_drawn(tmp_path):
    records = [{"step": step, "loss": 1.0 / (step + 1), "images_per_second": 3} for step in range(300)]
    write_metrics(tmp_path / "metrics.jsonl", [{"event": "start"}, *records], tail='{"step": 30')
    pictures.loss_curve(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        pixels = np.array(picture.convert("RGB")).astype(int)
    assert pixels.shape[1] > 600
    assert (pixels[..., 2] - pixels[..., 0] > 60).sum() > 300  # the blue line


def test_a_resumed_run_counts_each_step_once_and_infinite_losses_not_at_all(tmp_path):
    records = [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 4.0}]
    write_metrics(tmp_path / "m", [*records, {"step": 3, "loss": float("nan")}, {"step": 4, "loss": None}])
    steps, losses = pictures._series(tmp_path / "m", "loss")
    assert (steps.tolist(), losses.tolist()) == ([1, 2], [5.0, 4.0])


def test_running_mean():
    values = np.array([4.0, 2.0, 0.0, 6.0])
    assert pictures._running_mean(values, 1).tolist() == [4, 2, 0, 6]
    assert pictures._running_mean(values, 2).tolist() == [4, 3, 1, 3]
    assert pictures._running_mean(values, 9).tolist() == [4, 3, 2, 3]


def test_curves_that_cannot_be_drawn_get_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="does not exist"):
        pictures.loss_curve(tmp_path / "no.jsonl", tmp_path / "loss.png")
    write_metrics(tmp_path / "m.jsonl", [{"step": 1, "reward": 2}])
    with pytest.raises(ValueError, match="no line with a step and loss"):
        pictures.loss_curve(tmp_path / "m.jsonl", tmp_path / "loss.png")
    write_metrics(tmp_path / "m.jsonl", [{"step": 1, "loss": 2}])
    real = builtins.__import__

    def without_matplotlib(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        pictures.loss_curve(tmp_path / "m.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
