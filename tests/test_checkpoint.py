"""Checkpoints: LFM's files and ours, and damaged ones."""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import lfm_fast
from lfm_fast import checkpoint
from lfm_fast.checkpoint import read_weights, save_weights
from lfm_fast.models import NETWORKS, DiT, SongUNet, create_model
from lfm_fast.models.recognise import recognise

GOLDEN = Path(__file__).parent / "golden"
TINY = {"hidden_size": 16, "depth": 2, "num_heads": 4, "patch_size": 2}


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    """A known configuration small enough for files of a few kilobytes, and two of its hidden size beside it."""
    monkeypatch.setitem(NETWORKS, "DiT-Deep", (DiT, {**TINY, "depth": 4}))
    monkeypatch.setitem(NETWORKS, "DiT-Tiny", (DiT, TINY))
    monkeypatch.setitem(NETWORKS, "DiT-Shallow", (DiT, {**TINY, "depth": 1}))


def tiny(seed=0, **arguments):
    torch.manual_seed(seed)
    return create_model("DiT-Tiny", **{"image_size": 64, **arguments}).eval()


def assert_same_weights(model, state_dict):
    found = model.state_dict()
    assert list(found) == list(state_dict)
    for name, tensor in state_dict.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def prefixed(state_dict, prefix="module."):
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def resumable(model, **arguments):
    """What `content.pth` holds: real optimizer and scheduler states after a step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500, eta_min=1e-5)
    model(torch.rand(2), torch.randn(2, 4, 8, 8)).square().mean().backward()
    optimizer.step()
    scheduler.step()
    assert len(optimizer.state_dict()["state"]) == len(parameters)
    return {
        "epoch": 3,
        "global_step": 1200,
        "args": argparse.Namespace(exp="celeb", lr=2e-4, use_ema=False, ch_mult=[1, 2], seed=None, **arguments),
        "model_dict": prefixed(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
    }


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_a_plain_state_dict(tmp_path, prefix, zipped):
    model, path = tiny(), tmp_path / "model_475.pth"
    torch.save(prefixed(model.state_dict(), prefix), path, _use_new_zipfile_serialization=zipped)
    found = lfm_fast.load_checkpoint(path)
    assert_same_weights(found, model.state_dict())
    assert found.config == model.config
    assert not found.training
    assert not found.pos_embed.requires_grad
    assert all(p.requires_grad for name, p in found.named_parameters() if name != "pos_embed")


def test_reads_a_resumable_checkpoint(tmp_path):
    model, path = tiny(), tmp_path / "content.pth"
    torch.save(resumable(model), path)
    assert_same_weights(lfm_fast.load_checkpoint(path), model.state_dict())


@pytest.mark.parametrize(("num_classes", "label_dropout"), [(10, 0.1), (11, 0.0)])
def test_arguments_in_the_file_settle_the_label_table(tmp_path, num_classes, label_dropout):
    model, path = tiny(num_classes=num_classes, label_dropout=label_dropout), tmp_path / "content.pth"
    torch.save(resumable(model, num_classes=num_classes, label_dropout=label_dropout), path)
    assert lfm_fast.load_checkpoint(path).config == model.config
    torch.save(model.state_dict(), path)  # nothing in the file tells which it is
    with pytest.raises(ValueError, match=r"11 rows, maybe 10 classes and a null label or 11 classes without"):
        lfm_fast.load_checkpoint(path)
    assert_same_weights(lfm_fast.load_checkpoint(path, tiny(seed=1, num_classes=11)), model.state_dict())


@pytest.mark.parametrize("name", ["celeb256_dit", "imnet_dit"])
def test_recognises_the_released_networks(name):
    manifest = json.loads((GOLDEN / f"{name}.json").read_text())
    config = recognise({key: tuple(shape) for key, shape in manifest["state_shapes"].items()}).config
    for ours, theirs in [("image_size", "img_resolution")] + [(key, key) for key in TINY]:
        assert config[ours] == manifest["config"][theirs]
    assert (config["num_classes"], config["label_dropout"]) == ((0, 0.0) if name == "celeb256_dit" else (1000, 0.1))


def test_a_prefix_that_only_some_names_carry_stays(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"module": torch.nn.Linear(2, 3), "other": torch.nn.Linear(3, 1)})
    torch.save(model.state_dict(), tmp_path / "m.pth")
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.nn.init.zeros_(model["module"].weight)
    assert_same_weights(lfm_fast.load_checkpoint(tmp_path / "m.pth", model), expected)


def test_loads_into_a_model_and_keeps_its_dtype(tmp_path):
    torch.save(tiny().state_dict(), tmp_path / "m.pth")
    model = tiny(seed=1).double().train()
    assert lfm_fast.load_checkpoint(tmp_path / "m.pth", model) is model
    assert not model.training
    assert_same_weights(model, tiny().double().state_dict())


def edited(**changes):
    state_dict = tiny().state_dict()
    for name, value in changes.items():
        state_dict.pop(name.replace("__", "."), None)
        if value is not None:
            state_dict[name.replace("__", ".")] = value
    return state_dict


@pytest.mark.parametrize(
    ("state_dict", "sentence"),
    [
        ({"blocks__1__mlp__fc1__bias": None}, "missing: blocks.1.mlp.fc1.bias"),
        ({"blocks__2__mlp__fc1__bias": torch.zeros(64)}, "unexpected: blocks.2.mlp.fc1.bias"),
        (
            {"blocks__0__mlp__fc1__bias": torch.zeros(3)},
            r"another shape: blocks.0.mlp.fc1.bias is \(3,\) and should be",
        ),
        ({f"extra{i}": torch.zeros(1) for i in range(9)}, "unexpected: extra0, extra1, extra2 and 6 more"),
    ],
)
def test_weights_that_do_not_fit_are_told(tmp_path, state_dict, sentence):
    path, model = tmp_path / "m.pth", tiny(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save(edited(**state_dict), path)
    with pytest.raises(ValueError, match=rf"m.pth: these weights do not fit the network \(DiT\); .*{sentence}"):
        lfm_fast.load_checkpoint(path, model)
    assert_same_weights(model, before)
    with pytest.raises(
        ValueError, match=rf"m.pth: .*belong to no network known here; the nearest is DiT-Tiny .*{sentence}"
    ):
        lfm_fast.load_checkpoint(path)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda x: x.to("meta"), "is a meta tensor"),
        (lambda x: x.to_sparse(), "is a torch.sparse_coo tensor"),
        (lambda x: x.to(torch.complex64), "is torch.complex64, but the network has torch.float32"),
        (lambda x: x.to(torch.int64), "is torch.int64, but the network has torch.float32"),
    ],
)
def test_tensors_of_another_kind_leave_the_model_as_it_was(tmp_path, spoil, sentence):
    path, model = tmp_path / "m.pth", tiny(seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state_dict = tiny().state_dict()
    last = list(state_dict)[-1]
    torch.save({**state_dict, last: spoil(state_dict[last])}, path)
    for given in (model, None):
        with pytest.raises(ValueError, match=f"m.pth: {last} {sentence}"):
            lfm_fast.load_checkpoint(path, given)
    assert_same_weights(model, before)


def test_another_filter_leaves_the_model_as_it_was(tmp_path):
    """Filters stand among the weights, and a network computes with its own."""
    sizes = {"image_size": 8, "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
    torch.manual_seed(0)
    model = SongUNet(**sizes, resample_filter=[1, 3, 3, 1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = SongUNet(**sizes, resample_filter=[1, 1, 1, 1])
    torch.save(other.state_dict(), tmp_path / "m.pth")
    with pytest.raises(
        ValueError, match=r"m.pth: enc.4x4_down.conv0.resample_filter is another filter than .* 1, 3, 3, 1"
    ):
        lfm_fast.load_checkpoint(tmp_path / "m.pth", model)
    assert_same_weights(model, before)
    save_weights(tmp_path / "m.safetensors", other.state_dict(), {"config": model.config})
    with pytest.raises(ValueError, match=r"m.safetensors: .*resample_filter is another filter"):
        lfm_fast.load_checkpoint(tmp_path / "m.safetensors")


def test_checkpoints_of_a_run_come_newest_first(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for stem in ("0000900", "10000000", "0001000", "best", "\u00b2", "12.old"):
        (tmp_path / "checkpoints" / f"{stem}.safetensors").touch()
    found = [path.stem for path in checkpoint.run_checkpoints(tmp_path)]
    assert found == ["10000000", "0001000", "0000900"]
    assert checkpoint.run_checkpoints(tmp_path / "nowhere") == []


def test_weights_of_nothing_known_are_told(tmp_path):
    torch.save({"conv.weight": torch.zeros(1), "conv.bias": torch.zeros(1)}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=r"no network known here \(their keys begin with conv.weight, conv.bias\)"):
        lfm_fast.load_checkpoint(tmp_path / "m.pth")


class Stranger:
    pass


class Attack:
    """Unpickled by the plain unpickler, this would run a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("make", "name"), [(lambda path: Stranger(), "test_checkpoint.Stranger"), (Attack, "posix.system")]
)
def test_refuses_every_other_class_by_name(tmp_path, make, name, zipped):
    path, sign = tmp_path / "content.pth", tmp_path / "ran"
    content = {**resumable(tiny()), "extra": make(sign)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"content.pth was refused: it holds a (tests[.])?{name},"):
        lfm_fast.load_checkpoint(path)
    assert not sign.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed for our own reading only


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ([1, 2], "holds a list, not a state dict"),
        ({}, "holds no plain state dict: it is empty"),
        ({"epoch": 3, "weight": torch.zeros(1)}, "holds no plain state dict: 'epoch' is no tensor"),
        ({"model_dict": None}, "holds a NoneType, not a state dict"),
        ({0: torch.zeros(1)}, "holds no plain state dict: 0 is no tensor"),
    ],
)
def test_refuses_other_contents(tmp_path, content, sentence):
    torch.save(content, tmp_path / "m.pth")
    with pytest.raises(ValueError, match=f"m.pth {sentence}"):
        lfm_fast.load_checkpoint(tmp_path / "m.pth")


def cuts(size):
    """Where files are cut: the first bytes, the last ones, and places between."""
    return sorted({*range(1, 12), 100, 511, *(size * i // 9 for i in range(1, 9)), *range(size - 24, size), size - 300})


@pytest.mark.parametrize("kind", ["zip", "legacy", "content", "safetensors"])
def test_a_truncated_file_gets_one_sentence(tmp_path, kind):
    path, model = tmp_path / "whole", tiny()
    if kind == "safetensors":
        save_weights(path, model.state_dict(), {"config": model.config})
    elif kind == "content":
        torch.save(resumable(model), path)
    else:
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    lfm_fast.load_checkpoint(path)
    whole, part = path.read_bytes(), tmp_path / "part"
    for cut in cuts(len(whole)):
        part.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="part is truncated") as caught:
            lfm_fast.load_checkpoint(part)
        assert "\n" not in str(caught.value), cut


def test_what_is_no_checkpoint_gets_one_sentence(tmp_path):
    (tmp_path / "text").write_text("not a checkpoint\n" * 100)
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "zeros").write_bytes(bytes(5000))
    (tmp_path / "empty").touch()
    with open(tmp_path / "arrays", "wb") as file:
        np.savez(file, a=np.zeros(3))
    for name, sentence in {
        "text": "text is a text file that begins with 'not a checkpoint",
        "noise": "is truncated or no checkpoint",
        "zeros": "is truncated or no checkpoint",
        "arrays": "is truncated or no checkpoint",
        "empty": "is empty",
        "missing": "there is no file .*missing",
        "": "is a folder; give the checkpoint file in it",
    }.items():
        with pytest.raises(ValueError, match=sentence) as caught:
            lfm_fast.load_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_our_weights_come_back_with_their_configuration(tmp_path):
    model = tiny(num_classes=4, label_dropout=0.1, num_heads=2)  # neither labels nor heads show in the shapes
    save_weights(tmp_path / "w.safetensors", model.state_dict(), {"config": model.config, "note": "é", "steps": [1, 2]})
    found = lfm_fast.load_checkpoint(tmp_path / "w.safetensors")
    assert found.config == model.config
    assert_same_weights(found, model.state_dict())
    state_dict, metadata = read_weights(tmp_path / "w.safetensors")
    assert metadata == {"config": model.config, "note": "é", "steps": [1, 2]}
    assert state_dict.keys() == model.state_dict().keys()


def test_half_precision_weights_load_as_float32(tmp_path):
    model = tiny()
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_weights(tmp_path / "w.safetensors", halves, {"config": model.config})
    assert_same_weights(lfm_fast.load_checkpoint(tmp_path / "w.safetensors"), {k: v.float() for k, v in halves.items()})


@pytest.mark.parametrize(("weights", "seed"), [("ema", 1), ("model", 0)])
def test_a_training_checkpoint_gives_its_average_or_its_weights(tmp_path, weights, seed):
    path, model = tmp_path / "0050000.safetensors", tiny(num_heads=2)
    tensors = prefixed(model.state_dict(), "model.") | {"optimizer.step": torch.tensor(7)}
    save_weights(path, tensors, {"config": model.config})
    assert_same_weights(lfm_fast.load_checkpoint(path, weights=weights), model.state_dict())
    save_weights(path, tensors | prefixed(tiny(1).state_dict(), "ema."), {"config": model.config})
    assert_same_weights(lfm_fast.load_checkpoint(path, weights=weights), tiny(seed).state_dict())
    assert list(read_weights(path, "optimizer.")[0]) == ["step"]


def test_safetensors_without_a_configuration_are_recognised(tmp_path):
    from safetensors.torch import save_file

    model = tiny()
    save_file(prefixed(model.state_dict()), tmp_path / "w.safetensors", {"format": "pt"})
    assert_same_weights(lfm_fast.load_checkpoint(tmp_path / "w.safetensors"), model.state_dict())
    assert read_weights(tmp_path / "w.safetensors")[1] == {"format": "pt"}


def test_a_configuration_that_contradicts_the_weights_is_told(tmp_path):
    save_weights(tmp_path / "w.safetensors", tiny().state_dict(), {"config": tiny(depth=1).config})
    with pytest.raises(
        ValueError, match=r"do not fit the network .* unexpected: blocks.1.adaLN_modulation.* and 7 more"
    ):
        lfm_fast.load_checkpoint(tmp_path / "w.safetensors")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_loaded_model_does_not_depend_on_its_file(tmp_path, suffix):
    model, path = tiny(), tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save(model.state_dict(), path)
    else:
        save_weights(path, model.state_dict(), {"config": model.config})
    found, size = lfm_fast.load_checkpoint(path), path.stat().st_size
    read = read_weights(path)[0] if suffix == "safetensors" else found.state_dict()
    with open(path, "r+b") as file:
        file.write(b"\xff" * size)  # in place, as a careless copy does
    assert_same_weights(found, model.state_dict())
    assert torch.equal(read["x_embedder.proj.weight"], model.x_embedder.proj.weight)


def test_wrong_arguments_get_a_sentence(tmp_path):
    with pytest.raises(ValueError, match='"ema" or "model", but is \'best\''):
        lfm_fast.load_checkpoint(tmp_path / "w.safetensors", weights="best")
    for path in (None, 3):
        with pytest.raises(ValueError, match="give the checkpoint file's path"):
            lfm_fast.load_checkpoint(path)
    with pytest.raises(ValueError, match="model is a dict"):
        lfm_fast.load_checkpoint(tmp_path / "w.safetensors", {})
    with pytest.raises(ValueError, match="tensors only, but 'step' is a int"):
        save_weights(tmp_path / "w.safetensors", {"step": 3})
    with pytest.raises(ValueError, match="is not JSON"):
        save_weights(tmp_path / "w.safetensors", {}, {"config": object()})
    assert list(tmp_path.iterdir()) == []
