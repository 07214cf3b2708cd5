"""LFM's own files and folders: written as LFM does, and found where it keeps them."""

from collections.abc import Mapping

import pytest
import torch

import lfm_fast
from lfm_fast import LatentFlow
from lfm_fast.autoencoder import load_autoencoder
from lfm_fast.interop.dit import DiTVelocity
from lfm_fast.interop.released import find_weights, save_released
from lfm_fast.models import NETWORKS, DiT, create_model
from lfm_fast.pipeline import folders


@pytest.fixture(autouse=True)
def tiny_network(monkeypatch):
    sizes = {"hidden_size": 16, "depth": 2, "num_heads": 4, "patch_size": 2}
    monkeypatch.setitem(NETWORKS, "DiT-Tiny", (DiT, sizes))


def tiny(seed=0, **arguments):
    torch.manual_seed(seed)
    return create_model("DiT-Tiny", image_size=64, **arguments).eval()


@pytest.mark.parametrize("prefix", ["", "module."])
def test_what_is_written_is_a_plain_state_dict_and_comes_back(tmp_path, prefix):
    model = tiny().to(torch.bfloat16)
    path = save_released(model, tmp_path / "exp", epoch=475, prefix=prefix)
    assert path == tmp_path / "exp" / "model_475.pth"
    content = torch.load(path, weights_only=True)
    assert isinstance(content, Mapping)
    assert list(content) == [prefix + name for name in model.state_dict()]
    assert all(tensor.dtype == torch.float32 for tensor in content.values())
    again = lfm_fast.load_checkpoint(path)
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], x.float()) for name, x in model.state_dict().items())


def test_a_file_is_written_where_it_is_named_and_replaced_whole(tmp_path):
    path = save_released(tiny(), tmp_path / "mine.pth", epoch=3)
    assert path == tmp_path / "mine.pth"
    save_released(tiny(1), path)
    assert torch.equal(
        lfm_fast.load_checkpoint(path).state_dict()["x_embedder.proj.weight"],
        tiny(1).state_dict()["x_embedder.proj.weight"],
    )
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("model", "epoch", "says"),
    [
        (lambda: DiT(image_size=8, hidden_size=16, depth=1, num_heads=2, qk_norm=True), 0, "has no qk_norm"),
        (lambda: DiTVelocity(tiny(), null_label=0), 0, "a DiTVelocity is none of them; give its .network"),
        (lambda: torch.nn.Linear(2, 2), 0, "a Linear is none of them"),
        (tiny, -1, "epoch is -1"),
        (tiny, True, "epoch is True"),
    ],
)
def test_what_lfm_does_not_have_is_not_written(tmp_path, model, epoch, says):
    with pytest.raises(ValueError, match=says):
        save_released(model(), tmp_path, epoch)
    assert not list(tmp_path.iterdir())


def released(root, dataset, experiment, *names):
    folder = root / "saved_info" / "latent_flow" / dataset / experiment
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_the_newest_epoch_is_the_highest_number(tmp_path):
    folder = released(tmp_path, "celeba_256", "f8_dit", "model_9.pth", "model_475.pth", "model_50.pth", "content.pth")
    (folder / "model_best.pth").touch()
    (folder / "model_9999.pth.bak").touch()
    assert find_weights(folder) == folder / "model_475.pth"


def test_a_resumable_checkpoint_serves_where_there_is_nothing_else(tmp_path):
    folder = released(tmp_path, "celeba_256", "f8_dit", "content.pth")
    assert find_weights(folder) == find_weights(tmp_path) == folder / "content.pth"


@pytest.mark.parametrize("above", range(5))
def test_one_experiment_is_found_from_every_folder_above_it(tmp_path, above):
    folder = released(tmp_path, "ffhq_256", "f8_dit", "model_475.pth", "model_25.pth")
    assert find_weights([folder, *folder.parents][above]) == folder / "model_475.pth"


def test_several_experiments_are_listed(tmp_path):
    for dataset, experiment in (("ffhq_256", "f8_dit"), ("celeba_256", "f8_adm"), ("celeba_256", "f8_dit")):
        released(tmp_path, dataset, experiment, "model_475.pth")
    listed = "celeba_256/f8_adm, celeba_256/f8_dit, ffhq_256/f8_dit$"
    with pytest.raises(ValueError, match=f"latent_flow holds 3 experiments; give the folder of one: {listed}"):
        find_weights(tmp_path / "saved_info" / "latent_flow")
    with pytest.raises(ValueError, match=r"2 experiments; give the folder of one: f8_adm, f8_dit$"):
        LatentFlow.from_pretrained(tmp_path / "saved_info" / "latent_flow" / "celeba_256")
    for number in range(30):
        released(tmp_path, "many", f"{number:02d}", "model_1.pth")
    with pytest.raises(ValueError, match=r"33 experiments; .* and 13 more$"):
        find_weights(tmp_path)


def test_folders_without_weights_are_none(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.pth").touch()
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)  # not where LFM keeps any
    (tmp_path / "a" / "b" / "c" / "model_1.pth").touch()
    assert find_weights(tmp_path) is None
    with pytest.raises(ValueError, match=r"nor one of LFM's \(model_<epoch>.pth\)"):
        LatentFlow.from_pretrained(tmp_path)


@pytest.mark.parametrize("place", ["saved_info", "saved_info/latent_flow/celeba_256/f8_dit", "file"])
def test_a_flow_of_lfms_folders(tmp_path, place):
    folder = tmp_path / "saved_info/latent_flow/celeba_256/f8_dit"
    save_released(tiny(1), folder, epoch=9)
    file = save_released(tiny(), folder, epoch=10)
    flow = LatentFlow.from_pretrained(file if place == "file" else tmp_path / place, autoencoder="embedded")
    assert flow.path == lfm_fast.paths.Linear(sigma_min=1e-5)
    name = "x_embedder.proj.weight"
    assert torch.equal(flow.model.state_dict()[name], tiny().state_dict()[name])


def test_what_lfm_does_not_record_is_the_papers(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(folders, "load_autoencoder", lambda name: asked.append(name) or load_autoencoder("embedded"))
    LatentFlow.from_pretrained(save_released(tiny(), tmp_path, epoch=3))
    assert asked == ["stabilityai/sd-vae-ft-mse"]


def test_lfms_inpainting_network_inpaints_when_its_file_is_opened(tmp_path):
    """Nine channels in and four out are enough to know what it is conditioned on."""
    sizes = {"model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1, "in_channels": 9, "out_channels": 4}
    model = create_model("adm-original", image_size=64, **sizes)
    file = save_released(model, tmp_path, epoch=475)
    with pytest.raises(ValueError, match=r"do not tell num_heads.* as `model`.* in_channels=9"):
        LatentFlow.from_pretrained(file, autoencoder="embedded")
    flow = LatentFlow.from_pretrained(
        file, autoencoder="embedded", model=create_model("adm-original", image_size=128, **sizes)
    )
    picture, hole = torch.rand(3, 64, 64), torch.zeros(64, 64, dtype=torch.bool)
    hole[16:48, 16:48] = True
    painted = flow.inpaint(picture, hole, method="euler", num_steps=1)[0]
    assert torch.equal(painted[:, ~hole], picture[:, ~hole])
    assert not torch.allclose(painted[:, hole], picture[:, hole], atol=0.01)
