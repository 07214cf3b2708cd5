"""U-Nets without a configuration: the released ones by every key and shape, and of others what has to be told."""

import json
import re
from pathlib import Path

import pytest
import torch

import lfm_fast
from lfm_fast.models import create_model, from_reference_config
from lfm_fast.models.recognise import recognise
from lfm_fast.models.shapes import shapes_of

GOLDEN = Path(__file__).parents[1] / "golden"
MANIFESTS = ("celeb256_adm", "celeb512_adm", "church_adm", "ffhq_adm", "imnet_adm", "inpainting", "semantic")


def manifest(name):
    content = json.loads((GOLDEN / f"{name}.json").read_text())
    return content, {key: tuple(shape) for key, shape in content["state_shapes"].items()}


def test_no_manifest_is_left_out():
    assert {path.stem for path in GOLDEN.glob("*.json")} == {*MANIFESTS, "celeb256_dit", "imnet_dit"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_released_network_is_known_with_all_that_shapes_do_not_tell(name):
    content, shapes = manifest(name)
    found = recognise(shapes)
    with torch.device("meta"):
        want = from_reference_config({"family": content["family"], **content["config"]})
    assert type(found) is type(want)
    assert found.config == want.config
    assert sum(parameter.numel() for parameter in found.parameters()) == content["params"]


@pytest.mark.parametrize("name", ["inpainting", "semantic"])
def test_networks_of_tasks_return_the_channels_of_the_latent(name):
    found = recognise(manifest(name)[1])
    assert (found.in_channels, found.out_channels) == ({"inpainting": 9, "semantic": 8}[name], 4)


def without_a_key(shapes):
    del shapes["middle_block.1.norm.bias"]


def with_a_key(shapes):
    shapes["extra.weight"] = (3,)


def another_shape(shapes):
    shapes["input_blocks.0.0.weight"] = (256, 5, 3, 3)


@pytest.mark.parametrize("edit", [without_a_key, with_a_key, another_shape])
def test_nearly_a_released_network_is_none(edit):
    _, shapes = manifest("church_adm")
    edit(shapes)
    with pytest.raises(ValueError, match=r"of adm-original and none that was released.*do not tell num_heads") as said:
        recognise(shapes)
    assert ("in_channels=5" in str(said.value)) == (edit is another_shape)
    assert ("the nearest that was is adm-original; " in str(said.value)) == (edit is not another_shape)
    assert {without_a_key: "missing: middle", with_a_key: "unexpected: extra", another_shape: ""}[edit] in str(
        said.value
    )
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("adm", "conv.weight"),
        ("ncsn++", "conv.weight"),
        ("adm-layout", "attn2.to_k.weight"),
        ("adm", "block0.conv0.weight"),
    ],
)
def test_weights_that_sizes_are_read_from_may_be_missing(name, end):
    with torch.device("meta"):
        shapes = shapes_of(create_model(name).state_dict())
    shapes = {key: shape for key, shape in shapes.items() if not (key.endswith(end) and "aux" not in key)}
    with pytest.raises(ValueError, match=rf"of {re.escape(name)} and none that was released.*with those and its sizes"):
        recognise(shapes)


@pytest.mark.parametrize("key", ["output_blocks.{}.0.x", "input_blocks.1.1.transformer_blocks.{}.x"])
def test_a_number_in_a_key_is_no_reason_to_count_to_it(key):
    with torch.device("meta"):
        shapes = shapes_of(create_model("adm-layout").state_dict())
    with pytest.raises(ValueError, match="of adm-layout and none that was released"):
        recognise({**shapes, key.format(10**9): (1,)})


SMALL = {"model_channels": 32, "channel_mult": [1, 2]}
GUIDED = {**SMALL, "num_res_blocks": 1, "attention_resolutions": [2]}
EDM = {**SMALL, "num_blocks": 1, "attn_resolutions": [4]}
CONDITIONED = {"in_channels": 9, "out_channels": 4}
NETWORKS = [
    ("adm-original", GUIDED, {"num_heads": 2}),
    ("adm-original", {**GUIDED, **CONDITIONED, "resblock_updown": True}, {"num_head_channels": 16}),
    ("adm-original", {**GUIDED, "num_res_blocks": 3, "conv_resample": False, "use_scale_shift_norm": False}, {}),
    ("adm-original", {**GUIDED, "channel_mult": [1], "attention_resolutions": []}, {"use_new_attention_order": True}),
    ("adm-layout", {**GUIDED, "context_dim": 24, "transformer_depth": 2}, {"num_heads": 2}),
    ("adm", EDM, {"dropout": 0.1}),
    ("ddpm++", EDM, {}),
    ("ncsn++", {**EDM, "channel_mult_noise": 1}, {}),
]


@pytest.mark.parametrize(("name", "sizes", "untold"), NETWORKS, ids=[f"{n}-{i}" for i, (n, *_) in enumerate(NETWORKS)])
def test_what_the_sentence_says_and_asks_for_makes_the_network(tmp_path, name, sizes, untold):
    torch.manual_seed(0)
    model = create_model(name, **({"image_size": 64} | sizes | untold))
    torch.save(model.state_dict(), tmp_path / "model_1.pth")
    with pytest.raises(ValueError, match=r"keys and shapes do not tell .*dropout") as said:
        lfm_fast.load_checkpoint(tmp_path / "model_1.pth")
    call = re.search(r"with those and (.*)\.$", str(said.value))[1]
    told = eval(f"dict({call})", {"nothing": None}) if call != "nothing else" else {}
    assert told.keys() <= {*sizes, "image_size"}
    assert all(sizes.get(size, value) == value for size, value in told.items())
    for asked in untold:
        assert asked in str(said.value)
    given = create_model(name, **{"image_size": 64, **told, **untold})
    found = lfm_fast.load_checkpoint(tmp_path / "model_1.pth", given)
    assert found.config == model.config
    assert all(torch.equal(found.state_dict()[key], x) for key, x in model.state_dict().items())


@pytest.mark.parametrize("name", ["adm", "adm-original"])
def test_of_a_labelled_network_the_null_label_is_asked_for(name):
    with torch.device("meta"):
        sizes = {**EDM, "model_channels": 64} if name == "adm" else GUIDED
        shapes = shapes_of(create_model(name, image_size=64, num_classes=5, **sizes).state_dict())
    with pytest.raises(ValueError, match=r"and label_dropout; give .* num_classes=5"):
        recognise(shapes)


def test_a_row_of_the_label_table_may_be_the_null_label():
    with torch.device("meta"):
        shapes = shapes_of(
            create_model("adm-original", image_size=64, num_classes=5, label_dropout=0.1, **GUIDED).state_dict()
        )
    with pytest.raises(ValueError, match=r"num_classes=6 \(5 with label_dropout\)"):
        recognise(shapes)
