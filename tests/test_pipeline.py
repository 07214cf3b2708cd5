"""LatentFlow: images depend on (seed, number, label) alone, survive saving, and bad arguments get one sentence."""

import errno
import os

import numpy as np
import pytest
import torch

import lfm_fast
from lfm_fast import LatentFlow, pictures
from lfm_fast.autoencoder import Autoencoder, SmallVAE
from lfm_fast.checkpoint import checksum, save_weights
from lfm_fast.data import open_images
from lfm_fast.flow.paths import Linear, VarianceExploding, VariancePreserving, describe, make_path
from lfm_fast.models import DiT
from lfm_fast.pipeline.preview import Preview


def tiny_flow(num_classes=3, label_dropout=0.1, **settings):
    torch.manual_seed(0)
    model = DiT(
        image_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=num_classes, label_dropout=label_dropout
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))  # fresh weights give velocity zero
    network = SmallVAE(block_out_channels=(16, 32))
    names = tuple("abc"[:num_classes])
    return LatentFlow(model.eval(), Autoencoder(network, "tiny"), class_names=names, **settings)


@pytest.fixture(scope="module")
def flow():
    return tiny_flow(sampling={"method": "heun", "num_steps": 5, "guidance_scale": 2.0})


@pytest.fixture(scope="module")
def embedded():
    return LatentFlow.from_pretrained("embedded")


def test_images_are_in_range_and_of_the_right_size(flow):
    images = flow.sample(5, y=1)
    assert images.shape == (5, 3, flow.image_size, flow.image_size) == (5, 3, 16, 16)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1


def test_an_image_depends_on_its_number_alone(flow):
    together = flow.sample(7, y=[0, 1, 2, 0, 1, 2, 0], seed=5)
    # matrix products of other sizes sum in another order
    torch.testing.assert_close(
        flow.sample(7, y=[0, 1, 2, 0, 1, 2, 0], seed=5, batch_size=3), together, atol=1e-4, rtol=0
    )
    alone = flow.sample(1, y=[1], seed=5, indices=[4])
    torch.testing.assert_close(alone[0], together[4], atol=1e-4, rtol=0)
    assert not torch.allclose(flow.sample(1, y=[1], seed=6, indices=[4])[0], together[4], atol=1e-3)


def test_a_preview_is_what_straight_on_comes_to(flow):
    """After the first of two Euler steps: what one step alone draws; after the last: the images themselves."""
    shown, seen = [], []
    settings = {"y": [0, 1, 2], "method": "euler"}
    images = flow.sample(
        3,
        num_steps=2,
        preview=lambda *step: shown.append(step),
        callback=lambda step, t, z: seen.append((step, t)),
        **settings,
    )
    assert [(step, t) for step, t, _ in shown] == seen == [(1, 0.5), (2, 0.0)]
    torch.testing.assert_close(shown[0][2], flow.sample(3, num_steps=1, **settings), atol=1e-4, rtol=0)
    torch.testing.assert_close(shown[1][2], images, atol=1e-5, rtol=0)


def test_a_preview_of_samples_with_steps_of_their_own(flow):
    """The first that arrives stays what it is while the others go on."""
    shown = []
    images = flow.sample(3, y=[0, 1, 2], method="dopri5", preview=lambda *step: shown.append(step))
    assert (shown[-1][1] == 0).all()
    for _, t, pictures_then in shown:
        there = t == 0
        torch.testing.assert_close(pictures_then[there], images[there], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"time_grid": [0.9, 0.5, 0.0]},
        {"num_steps": 4, "guidance": lfm_fast.guidance.CFGZeroStar(1.0, zero_steps=2)},
    ],
)
def test_a_preview_knows_when_the_first_step_began(flow, settings):
    """The data of the first velocity, whatever the time at which the state began to move."""
    shown, asked = [], []

    def watch(module, inputs, output):
        asked.append((*(x.clone() for x in inputs[:2]), output))

    handle = flow.model.register_forward_hook(watch)
    flow.sample(2, method="euler", preview=lambda *step: shown.append(step), **settings)
    handle.remove()
    t, z, velocity = asked[0]
    expected = flow.decode(flow.path.data_from_velocity(velocity, z, t))
    torch.testing.assert_close(shown[0][2], expected, atol=1e-4, rtol=0)


def test_a_preview_of_a_refused_attempt_is_the_one_before(flow):
    """A state that did not move is no data before it has arrived."""
    shown = Preview(lambda *step: step, flow, torch.ones(2, *flow.latent_shape), {})
    half = torch.tensor([0.5, 0.5], dtype=torch.float64)
    before = shown(1, half, 0.8 * torch.ones(2, *flow.latent_shape))[2]
    z = torch.stack([0.8 * torch.ones(flow.latent_shape), 0.6 * torch.ones(flow.latent_shape)])
    after = shown(2, torch.tensor([0.5, 0.25], dtype=torch.float64), z)[2]
    torch.testing.assert_close(after[0], before[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid", [[0.5, 0.0], [0.0, 0.5, 1.0], torch.tensor([0.7, 0.2])])
def test_times_that_do_not_begin_at_noise_are_refused(flow, grid):
    with pytest.raises(ValueError, match=r"time_grid begins at t = .* of the noise"):
        flow.sample(1, method="euler", time_grid=grid, t_end=float(grid[-1]))


def test_a_preview_may_end_the_batch(flow):
    half = flow.sample(2, y=0, method="euler", num_steps=4, preview=lambda step, t, images: step < 2)
    want = flow.sample(2, y=0, method="euler", time_grid=torch.tensor([1.0, 0.75, 0.5]), t_end=0.5)
    torch.testing.assert_close(half, want, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="preview is 3"):
        flow.sample(1, preview=3)


def test_labels_by_name_index_and_tensor_agree(flow):
    by_name = flow.sample(2, y=["c", "A"])
    assert torch.equal(by_name, flow.sample(2, y=[2, 0]))
    assert torch.equal(by_name, flow.sample(2, y=torch.tensor([2, 0])))
    assert not torch.equal(by_name, flow.sample(2))


def test_its_own_sampling_arguments_are_defaults(flow):
    same = flow.sample(2, y=0, method="heun", num_steps=5, guidance_scale=2.0)
    assert torch.equal(flow.sample(2, y=0), same)
    assert not torch.equal(flow.sample(2, y=0, guidance_scale=1.0), same)


def test_equals_the_three_stages_by_hand(flow):
    z_1 = lfm_fast.noise(2, flow.latent_shape, seed=9)
    y = torch.tensor([0, 2])
    z_0 = lfm_fast.sample(flow.model, z_1, y=y, null_label=3, guidance_scale=2.0, method="heun", num_steps=5)
    by_hand = (flow.autoencoder.decode(z_0) + 1) / 2
    assert torch.equal(flow.sample(2, y=y, seed=9), by_hand)


def test_sampling_begins_at_the_prior_of_the_path():
    """On the variance exploding path noise is sigma_max times the standard one."""
    flow = tiny_flow(path=VarianceExploding(sigma_min=0.01, sigma_max=5.0))
    z_1 = 5.0 * lfm_fast.noise(2, flow.latent_shape, seed=9)
    z_0 = lfm_fast.sample(flow.model, z_1, method="euler", num_steps=3, path=flow.path)
    by_hand = (flow.autoencoder.decode(z_0) + 1) / 2
    # 5.0 here and sigma(1) there are one number to a rounding, and decoded values are within [0, 1]
    torch.testing.assert_close(flow.sample(2, seed=9, method="euler", num_steps=3), by_hand, rtol=0, atol=1e-4)


def test_survives_saving(tmp_path, flow):
    flow.save_pretrained(tmp_path / "saved")
    again = LatentFlow.from_pretrained(tmp_path / "saved")
    # the small VAE is written in float16
    torch.testing.assert_close(again.sample(3, y=1), flow.sample(3, y=1), atol=5e-3, rtol=0)
    assert (again.class_names, again.sampling, again.path) == (flow.class_names, flow.sampling, flow.path)
    again.save_pretrained(tmp_path / "again")
    twice = LatentFlow.from_pretrained(tmp_path / "again")
    assert torch.equal(twice.sample(3, y=1), again.sample(3, y=1))


@pytest.mark.parametrize("path", [Linear(sigma_min=1e-5), VariancePreserving(beta_max=15.0)])
def test_path_survives_being_described(path):
    assert make_path(**describe(path)) == path


def test_reads_lfm_checkpoints(tmp_path):
    reference = tiny_flow()
    model = lfm_fast.create_model("DiT-S/8", image_size=256)
    torch.save({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "model_5.pth")
    flow = LatentFlow.from_pretrained(tmp_path / "model_5.pth", autoencoder=reference.autoencoder)
    assert flow.path == Linear(sigma_min=1e-5)
    assert torch.equal(flow.model.state_dict()["pos_embed"], model.state_dict()["pos_embed"])


def test_reads_a_run_s_newest_checkpoint(tmp_path, flow):
    recorded = {
        "path": {"name": "linear", "sigma_min": 1e-5},
        "autoencoder": "embedded",
        "class_names": ["x", "y", "z"],
        "sampling": {"method": "euler", "num_steps": 3},
    }
    tensors = {f"ema.{key}": value for key, value in flow.model.state_dict().items()}
    metadata = {"config": flow.model.config, "flow": recorded, "training": {}}
    for step, scale in ((9_999_999, 0.0), (10_000_000, 1.0)):  # the newest by number is not the last by name
        scaled = {key: value * scale for key, value in tensors.items()}
        save_weights(tmp_path / "checkpoints" / f"{step:07d}.safetensors", scaled, metadata)
    read = LatentFlow.from_pretrained(tmp_path)
    assert torch.equal(read.model.state_dict()["pos_embed"], flow.model.state_dict()["pos_embed"])
    assert (read.path, read.class_names, read.sampling["num_steps"]) == (Linear(sigma_min=1e-5), ("x", "y", "z"), 3)
    assert read.sample(1, y="z").shape == (1, 3, 32, 32)


def test_embedded_flow_draws_its_categories(embedded):
    """Guided samples look most like training images of the category asked for."""
    training_set = open_images("embedded", embedded.image_size, split="train")
    references = training_set.batch(range(len(training_set)))
    flags = embedded.class_names.index("Flags")
    images = embedded.sample(16, y="Flags", seed=3, num_steps=10)
    labels = training_set.labels[torch.from_numpy(pictures.nearest(images, references))]
    assert (labels == flags).float().mean() >= 0.75  # one training image in seven is a flag
    smileys = embedded.sample(16, y="Smileys & Emotion", seed=3, num_steps=10)
    labels = training_set.labels[torch.from_numpy(pictures.nearest(smileys, references))]
    assert (labels == flags).float().mean() <= 0.25


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"num_images": 0}, "from 1 on"),
        ({"num_images": 2, "y": "nobody"}, "there is no class 'nobody'; there is a, b, c"),
        ({"num_images": 2, "y": 3}, "knows 0 to 2"),
        ({"num_images": 2, "y": -1}, "knows 0 to 2"),
        ({"num_images": 2, "y": [0, 1, 2]}, "3 labels for 2 images"),
        ({"num_images": 2, "y": [0.5, 1]}, "neither a name nor an index"),
        ({"num_images": 2, "batch_size": 0}, "batch_size"),
        ({"num_images": 2, "indices": [1]}, "int64 numbers from 0 on"),
        ({"num_images": 2, "indices": [0.5, 1.5]}, "int64 numbers from 0 on"),
        ({"num_images": 2, "indices": [-1, 0]}, "int64 numbers from 0 on"),
        ({"num_images": 2, "batch_size": True}, "batch_size"),
        ({"num_images": 2, "return_stats": True}, "from noise to image"),
        ({"num_images": 2, "path": Linear(sigma_min=0.1)}, "own path"),
        ({"num_images": 2, "t_start": 0.5}, "from noise to image"),
        ({"num_images": 2, "method": "newton"}, "method is 'newton'"),
    ],
)
def test_refuses_with_a_sentence(flow, arguments, says):
    with pytest.raises(ValueError, match=says):
        flow.sample(**arguments)


def test_labels_and_scales_of_numpy_and_one_each(flow):
    y = np.array([2, 0, 1])
    assert torch.equal(flow.sample(3, y=y), flow.sample(3, y=[np.int64(2), 0, 1]))
    scales = torch.tensor([1.0, 2.0, 3.0])
    together = flow.sample(3, y=y, guidance_scale=scales)
    torch.testing.assert_close(flow.sample(3, y=y, guidance_scale=scales, batch_size=2), together, atol=1e-4, rtol=0)
    assert torch.allclose(together[1], flow.sample(3, y=y, guidance_scale=2.0)[1], atol=1e-4)
    assert not torch.allclose(together[2], flow.sample(3, y=y, guidance_scale=2.0)[2], atol=1e-4)


def test_a_guidance_object_takes_the_place_of_the_flows_scale_and_goes_image_by_image(flow):
    y, scales = np.array([2, 0, 1]), torch.tensor([1.0, 2.0, 3.0])
    linear = lfm_fast.guidance.LinearGuidance(2.0)
    assert torch.equal(flow.sample(3, y=y, guidance=linear), flow.sample(3, y=y))  # whose scale is 2
    together = flow.sample(3, y=y, guidance=lfm_fast.guidance.APG(scales))
    parts = flow.sample(3, y=y, guidance=lfm_fast.guidance.APG(scales), batch_size=2)
    torch.testing.assert_close(parts, together, atol=1e-4, rtol=0)
    for i in (0, 2):
        one = flow.sample(3, y=y, guidance=lfm_fast.guidance.APG(float(scales[i])))
        torch.testing.assert_close(one[i], together[i], atol=1e-4, rtol=0)
        assert not torch.allclose(one[1], together[1], atol=1e-4)
    with pytest.raises(ValueError, match="Both guidance and guidance_scale"):
        flow.sample(3, y=y, guidance=linear, guidance_scale=2.0)
    with pytest.raises(ValueError, match=r"guidance_scale is \(2,\)"):
        flow.sample(3, y=y, guidance=lfm_fast.guidance.Rescale(scales[:2]))


def test_a_classifier_guides_a_flow_that_was_trained_without_labels():
    flow = tiny_flow(num_classes=0, label_dropout=0.0, sampling={"method": "heun", "num_steps": 5})
    lead = torch.zeros(9, 4, 8, 8)
    lead[7], lead[8] = 0.02, -0.02
    guidance = lfm_fast.guidance.ClassifierGuidance(lambda t, z: z.flatten(1) @ lead.flatten(1).T, 5.0)
    images = flow.sample(3, y=[7, 8, 0], guidance=guidance, batch_size=2)
    plain = flow.sample(3)
    changes = [(a - b).abs().max() for a, b in zip(images, plain)]
    assert changes[0] > 1e-3
    assert changes[1] > 1e-3
    with pytest.raises(ValueError, match="was trained without labels"):
        flow.sample(3, y=[7, 8, 0])


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saving_over_a_folder_is_never_half_done(tmp_path, flow, monkeypatch):
    flow.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("the user's")
    before, other = files(tmp_path), tiny_flow(sampling={"num_steps": 7})
    with torch.no_grad():
        other.model.pos_embed.add_(1.0)
    with monkeypatch.context() as failing:
        failing.setattr(other.autoencoder, "save_pretrained", lambda folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            other.save_pretrained(tmp_path)
    assert files(tmp_path) == before, "the flow that was there is lost"
    with monkeypatch.context() as failing:
        failing.setattr("lfm_fast.checkpoint.os.replace", replace_but("transformer/config.json", os.replace))
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds neither"):  # weights of the one, configuration of the other
        LatentFlow.from_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    assert LatentFlow.from_pretrained(tmp_path).sampling == {"num_steps": 7}
    assert files(tmp_path).keys() == before.keys()


def replace_but(place, replace):
    """os.replace that fails where it should put a file in this place of the final folder."""

    def replacing(source, target):
        if str(target).endswith(place) and ".partial" not in str(target):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    return replacing


def test_a_run_whose_newest_checkpoint_is_damaged_gives_an_older_one(tmp_path, flow):
    recorded = {"path": describe(flow.path), "autoencoder": "embedded", "class_names": [], "sampling": {}}
    tensors = {f"model.{key}": value for key, value in flow.model.state_dict().items()}
    paths = [tmp_path / "checkpoints" / f"{step:07d}.safetensors" for step in (10, 20, 30)]
    for path in paths:
        save_weights(path, tensors, {"config": flow.model.config, "flow": recorded, "checksum": checksum(tensors)})
    paths[2].write_bytes(paths[2].read_bytes()[:-1])
    data = bytearray(paths[1].read_bytes())
    data[-1] ^= 1
    paths[1].write_bytes(data)
    with pytest.warns(UserWarning, match="cannot be read") as warned:
        read = LatentFlow.from_pretrained(tmp_path)
    assert [str(path) in str(w.message) for path, w in zip(paths[:0:-1], warned, strict=True)] == [True, True]
    assert torch.equal(read.model.state_dict()["pos_embed"], flow.model.state_dict()["pos_embed"])
    paths[0].write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="skipping"),
        pytest.raises(ValueError, match=r"none of its checkpoints can be read \(.*0000010"),
    ):
        LatentFlow.from_pretrained(tmp_path)


def test_weights_are_saved_in_floating_point(tmp_path, flow):
    with pytest.raises(ValueError, match="floating-point"):
        flow.save_pretrained(tmp_path, dtype=torch.int8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("model_index.json", "{}", "model_index.json holds no path"),
        ("model_index.json", "[]", "model_index.json holds no path"),
        ("model_index.json", "{", "model_index.json is no JSON"),
        ("transformer/config.json", "{}", "config.json holds no family"),
        ("transformer/config.json", None, "the folder is incomplete"),
        ("vae/config.json", "{}", "does not load"),
    ],
)
def test_a_damaged_folder_gets_a_sentence(tmp_path, flow, file, content, says):
    flow.save_pretrained(tmp_path)
    (tmp_path / file).unlink() if content is None else (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=says):
        LatentFlow.from_pretrained(tmp_path)


def test_weights_of_another_depth_get_a_sentence(tmp_path, flow):
    flow.save_pretrained(tmp_path)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(config.read_text().replace('"depth": 2', '"depth": 3'))
    with pytest.raises(ValueError, match="do not fit"):
        LatentFlow.from_pretrained(tmp_path)


def test_unlabelled_network_refuses_labels():
    with pytest.raises(ValueError, match="without labels"):
        tiny_flow(num_classes=0, label_dropout=0.0).sample(1, y=0)


def test_refuses_an_autoencoder_of_other_latents(flow):
    with pytest.raises(ValueError, match="works on 4 latent channels"):
        LatentFlow(flow.model, Autoencoder(SmallVAE(block_out_channels=(16, 32), latent_channels=8), "wide"))


def test_nothing_there_gets_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="holds neither"):
        LatentFlow.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no file"):
        LatentFlow.from_pretrained(tmp_path / "nothing.safetensors")


def test_sample_numbers_that_are_none_are_refused(flow):
    for indices in ("ab", [None, 1], [0.5, 1.0], [0, -1]):
        with pytest.raises(ValueError, match="indices are"):
            flow.sample(2, indices=indices)
