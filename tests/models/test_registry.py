"""Networks by name, by their own configuration and by the reference's."""

import json

import pytest
import torch

import lfm_fast
from lfm_fast.models import NETWORKS, DiT, create_model, from_config, from_reference_config

REFERENCE = {"family": "dit", "img_resolution": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "depth": 1}
REFERENCE |= {"num_heads": 2}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_name_builds_and_its_configuration_rebuilds_it(name):
    with torch.device("meta"):
        model = create_model(name, image_size=256, num_classes=7, label_dropout=0.2)
        again = from_config(json.loads(json.dumps(model.config)))
    assert again.config == model.config
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_all_published_sizes_are_there():
    assert {f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)} <= set(NETWORKS)


def test_no_two_names_share_their_shapes():
    # A checkpoint without a configuration is recognised by its shapes, which do not show the number of heads.
    with torch.device("meta"):
        shapes = [tuple(p.shape for p in create_model(name, num_classes=7).parameters()) for name in NETWORKS]
    assert len(set(shapes)) == len(shapes)


def test_create_model_counts_in_pixels_and_takes_overrides():
    model = lfm_fast.create_model("DiT-Emoji/2", image_size=64, downsampling=4, in_channels=3, depth=1)
    assert isinstance(model, DiT)
    assert model.config["image_size"] == 16
    assert model(torch.rand(2), torch.randn(2, 3, 16, 16)).shape == (2, 3, 16, 16)
    assert len(model.blocks) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"name": "DiT-XL/3"}, "no network called 'DiT-XL/3'; did you mean DiT-XL/"),
        ({"name": "resnet"}, "known names: DiT-S/2"),
        ({"name": "DiT-S/2", "image_size": 100}, "100 is no multiple of the autoencoder's downsampling 8"),
        ({"name": "DiT-S/8", "image_size": 96}, "side 12 is no multiple of patch_size 8"),
        ({"name": "DiT-S/2", "width": 3}, "DiT has no argument width; it takes image_size"),
    ],
)
def test_create_model_refuses_with_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        create_model(**arguments)


@pytest.mark.parametrize("value", ["3", None, float("nan"), float("inf"), [3], True])
@pytest.mark.parametrize(
    "name",
    ["name", "image_size", "downsampling", "in_channels", "depth", "num_heads", "mlp_ratio", "num_classes"]
    + ["label_dropout"],
)
def test_create_model_refuses_values_of_another_type(name, value):
    with pytest.raises(ValueError, match="no network called" if name == "name" else f"{name} must"):
        create_model(**{"name": "DiT-S/8", "image_size": 64, name: value})


@pytest.mark.parametrize("config", [None, [1], "dit", {3: 4}, {"family": ["dit"]}])
@pytest.mark.parametrize("build", [from_config, from_reference_config])
def test_what_is_no_configuration_is_told(build, config):
    with pytest.raises(ValueError, match=r"a network's configuration (is a dict|must name its family)"):
        build(config)


def test_reference_values_of_another_type_are_told():
    with pytest.raises(ValueError, match="num_classes must be"):
        from_reference_config({**REFERENCE, "num_classes": "3"})


@pytest.mark.parametrize("family", [None, "transformer"])
def test_from_config_names_the_families(family):
    with pytest.raises(ValueError, match="must name its family, one of dit"):
        from_config({"family": family, "depth": 1})


def test_from_config_names_what_is_missing():
    with pytest.raises(ValueError, match="DiT needs depth, num_heads"):
        from_config({"family": "dit", "hidden_size": 16})


@pytest.mark.parametrize(
    ("labels", "num_classes", "null_label"),
    [
        ({"num_classes": 1, "label_dropout": 0.0}, 0, 0),
        ({"num_classes": 10, "label_dropout": 0.1}, 10, 10),
        ({"num_classes": 10, "label_dropout": 0.0}, 10, None),
        ({}, 0, 0),
    ],
)
def test_reference_labels(labels, num_classes, null_label):
    model = from_reference_config({**REFERENCE, **labels, "params": 1})
    assert (model.num_classes, model.null_label) == (num_classes, null_label)


def test_reference_config_refuses_an_unknown_argument():
    with pytest.raises(ValueError, match="has no argument image_size"):
        from_reference_config({**REFERENCE, "image_size": 8})
