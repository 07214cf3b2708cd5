"""What cannot be trained is said before images are read, which may take hours."""

import pytest

from lfm_fast.train import source as sources
from lfm_fast.train.config import from_preset
from lfm_fast.train.loop import train


@pytest.fixture
def images_untouched(monkeypatch):
    monkeypatch.setattr("lfm_fast.tasks.base.open_images", lambda *_, **__: pytest.fail("images were read"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"start_from": "nowhere"}, "--start-from nowhere does not exist; give 'embedded', a flow's folder or"),
        ({"image_size": 60}, "the latent's side 15 is no multiple of patch_size 4"),
        ({"image_size": 60, "model": "ADM-Emoji"}, "the latent's side 15 cannot be halved 2 times"),
        ({"image_size": 63}, "image_size 63 is not a multiple of 4, the autoencoder's factor"),
    ],
)
def test_before_the_images(settings, says, images_untouched, tmp_path):
    with pytest.raises(ValueError, match=says):
        train(from_preset("embedded", data="photos", device="cpu", output=str(tmp_path / "results"), **settings))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["DiT-Emoji/4", "ADM-Emoji"])
def test_what_can_be_trained_is_not_refused(model):
    for task in (None, "unconditional", "labelled"):
        sources._require_network(from_preset("embedded", model=model, task=task))


def test_an_autoencoder_that_is_not_here_may_be_of_any_shape():
    sources._require_network(from_preset("embedded", image_size=60, autoencoder="some/name"))
