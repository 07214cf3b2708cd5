"""The script that trains the flow which ships: its distance, what it keeps, refuses and writes."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lfm_fast import LatentFlow
from lfm_fast.train.journal import Journal

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture
def script(monkeypatch):
    """Its names, which its functions look up."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return runpy.run_path(str(SCRIPTS / "train_embedded_flow.py"))["main"].__globals__


def test_the_distance_is_that_of_its_definition(script):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 3, generator=generator), 1 + torch.randn(4, 3, generator=generator)

    def kernel(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b)) / 3 + 1) ** 3

    def within(a):
        found = [kernel(a[i], a[j]) for i in range(len(a)) for j in range(len(a)) if i != j]
        return sum(found) / len(found)

    between = sum(kernel(a, b) for a in x for b in y) / 20
    assert script["kernel_distance"](x, y) == pytest.approx(within(x) + within(y) - 2 * between)


def test_the_distance_of_one_distribution_is_zero_on_the_average(script):
    """Biased, the mean would be above 0 by far more than 4 standard errors."""
    generator = torch.Generator().manual_seed(1)
    found = [
        script["kernel_distance"](torch.randn(8, 4, generator=generator), torch.randn(8, 4, generator=generator))
        for _ in range(400)
    ]
    found = torch.tensor(found)
    assert found.mean().abs() < 4 * found.std() / 20


def test_a_smoke_run_leaves_all_that_is_promised(script, tmp_path):
    script["main"](["labelled", "--smoke", "--checkpoints", "2", "--device", "cpu", "--output", str(tmp_path)])
    folder = tmp_path / "labelled"
    report = json.loads((folder / "report.json").read_text())
    assert (report["steps"], report["images_seen"]) == (4, 16)
    curve = {int(step): kid for step, kid in report["kid_latents"]["by_step"].items()}
    assert sorted(curve) == [2, 4]
    assert report["kid_latents"]["kept"] == min(curve, key=curve.get)
    for name in ("loss.png", "kid.png", "samples.png", "nearest.png"):
        assert (folder / name).stat().st_size > 1000
    kept = LatentFlow.from_pretrained(folder / "flow")
    (checkpoint,) = (folder / "run").glob(f"*/checkpoints/{report['kid_latents']['kept']:07d}.safetensors")
    weights = LatentFlow.from_pretrained(checkpoint).model.state_dict()
    for name, value in kept.model.state_dict().items():
        assert torch.equal(value, weights[name].half().float()), name


def test_the_checkpoint_with_the_least_distance_is_kept(script, monkeypatch, tmp_path):
    flows = {1: "bad", 2: "best", 3: "worse"}
    distances = {"bad": 0.3, "best": 0.1, "worse": 0.2, "shipped": 0.4}

    class Measures:
        per_class, training, held_out = 1, torch.ones(3, 2), torch.zeros(3, 2)

        def __init__(self, *_):
            pass

        def samples(self, flow, per_class):
            return torch.zeros(9 * per_class, 3, 8, 8)

        def kid(self, flow):
            return distances[flow.name]

    def from_pretrained(source, device):
        name = "shipped" if source == "embedded" else flows[int(source.stem)]
        return SimpleNamespace(name=name, autoencoder=None, image_size=8, class_names=["a"] * 9)

    images = SimpleNamespace(batch=lambda _: torch.zeros(3, 3, 8, 8, dtype=torch.uint8))
    names = {"Measures": Measures, "LatentFlow": SimpleNamespace(from_pretrained=from_pretrained)}
    names |= {"run_checkpoints": lambda run: [Path(f"{step}.safetensors") for step in flows]}
    names |= {"open_images": lambda *_, **__: images}
    for name, value in names.items():
        monkeypatch.setitem(script, name, value)
    report = {}
    kept = script["labelled"](None, SimpleNamespace(where="cpu", smoke=True), tmp_path, report)
    assert kept.name == "best"
    assert report["kid_latents"]["by_step"] == {1: 0.3, 2: 0.1, 3: 0.2}
    assert report["kid_latents"]["shipped_flow"] == 0.4


def test_the_flow_is_written_before_it_is_measured(script, monkeypatch, tmp_path):
    """Measuring takes long, and may be stopped."""
    saved = []

    class Flow:
        def to(self, device):
            return self

        def save_pretrained(self, folder, dtype):
            saved.append(folder)

    def measure(flow, **_):
        raise KeyboardInterrupt

    names = {"trained": lambda *_: (tmp_path, 4, 1.0), "labelled": lambda *_: Flow(), "measure": measure}
    names |= {"read_metrics": lambda run: [{"images_per_s": 1.0, "loss": 1.0}]}
    names |= {"pictures": SimpleNamespace(loss_curve=lambda *_: None)}
    for name, value in names.items():
        monkeypatch.setitem(script, name, value)
    args = SimpleNamespace(output=tmp_path, where="cpu", smoke=False, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        script["run_task"]("labelled", args, "embedded")
    assert saved == [tmp_path / "labelled" / "flow"]


def test_the_length_follows_from_the_time(script, monkeypatch, tmp_path):
    def train(config):
        assert config.steps == script["TIMED_STEPS"]
        Journal(tmp_path).metrics(step=config.steps, steps_per_s=50.0)
        return tmp_path

    monkeypatch.setitem(script, "train", train)
    monkeypatch.setitem(script, "newest_step", lambda run: script["TIMED_STEPS"])
    assert script["steps_within"](2.0, "embedded", {}) == 2 * 60 * 50


def test_without_matplotlib_nothing_is_trained(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(script, "train", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else object())
    with pytest.raises(SystemExit):
        script["main"](["--output", str(tmp_path)])
    assert "needs matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "DiT-S/2"], "DiT-S/2 takes 65.0 MB in float16, more than --largest-mb 8"),
        (["--model", "DiT-Emojis/2"], "there is no network called 'DiT-Emojis/2'"),
        (["segmentation"], "there is no task 'segmentation'; there is labelled, inpainting, semantic"),
        (["--checkpoints", "0"], "--checkpoints is 0; give 1 or more"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_training(script, monkeypatch, tmp_path, capsys, flags, says):
    monkeypatch.setitem(script, "train", None)
    with pytest.raises(SystemExit):
        script["main"]([*flags, "--output", str(tmp_path)])
    assert says in capsys.readouterr().err
