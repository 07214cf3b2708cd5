import dataclasses
import math
import re
import shlex
from pathlib import Path

import pytest
import torch

import lfm_fast
from lfm_fast import _library
from lfm_fast.models import DiT
from lfm_fast.train import compiling, resume
from lfm_fast.train.config import TrainConfig, build_parser, from_preset, parse_args
from lfm_fast.train.presets import PRESETS
from lfm_fast.train.schedule import learning_rate, total_steps

# name -> network, batch over all GPUs, learning rate, schedule, epochs, label dropout (arXiv 2307.08698, appendix)
PUBLISHED = {
    "celeba256-dit-l2": ("DiT-L/2", 32, 2e-4, "constant", 500, 0.0),
    "ffhq256-dit-l2": ("DiT-L/2", 32, 2e-4, "cosine", 500, 0.0),
    "bedroom256-dit-l2": ("DiT-L/2", 32, 1e-4, "constant", 600, 0.0),
    "church256-dit-l2": ("DiT-L/2", 96, 1e-4, "constant", 600, 0.0),
    "imagenet256-dit-b2": ("DiT-B/2", 1280, 1e-4, "constant", 1000, 0.1),
    "celeba256-adm": ("adm-original-celeba256", 112, 2e-5, "cosine", 500, 0.0),
    "ffhq256-adm": ("adm", 128, 2e-5, "cosine", 500, 0.0),
    "bedroom256-adm": ("adm", 128, 1e-5, "constant", 500, 0.0),
    "church256-adm": ("adm-original", 128, 1e-5, "constant", 500, 0.0),  # not published: the bedroom's
    "imagenet256-adm": ("adm", 768, 1e-4, "constant", 1200, 0.1),
    "celeba512-adm": ("adm-original-celeba512", 48, 2e-5, "constant", 1000, 0.0),
    "celeba1024-adm": ("adm", 48, 2e-5, "constant", 1000, 0.0),
    "celeba256-inpainting": ("adm-original", 128, 5e-5, "cosine", 500, 0.0),
    "celeba256-semantic": ("adm-original", 128, 5e-5, "cosine", 175, 0.0),
}
# name -> guidance scale of the published FID, precision and task, where they are not those of most
SPECIAL = {
    "imagenet256-dit-b2": (1.5, "auto", "labelled"),
    "imagenet256-adm": (1.25, "auto", "labelled"),
    "celeba512-adm": (1.0, "bf16", "unconditional"),
    "celeba1024-adm": (1.0, "bf16", "unconditional"),
    "celeba256-inpainting": (1.0, "auto", "inpainting"),
    "celeba256-semantic": (1.0, "auto", "semantic"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_numbers(name):
    config = from_preset(name)
    optimisation = (config.batch_size, config.learning_rate, config.schedule, config.epochs)
    found = (config.model, *optimisation, config.label_dropout)
    assert found == PUBLISHED[name]
    side = int(re.search("[0-9]+", name)[0])
    assert (config.image_size, config.autoencoder) == (side, "stabilityai/sd-vae-ft-mse")
    default = (1.0, "auto", "unconditional")
    assert (config.guidance_scale, config.precision, config.task) == SPECIAL.get(name, default)
    assert (config.path, config.sigma_min, config.time_sampler) == ("linear", 1e-5, "uniform")
    assert (config.ema_decay, config.weight_decay, config.final_learning_rate) == (0.9999, 0.0, 1e-5)
    assert config.max_items == (120_000 if name.startswith(("bedroom", "church")) else None)
    assert config.num_classes == (1000 if name.startswith("imagenet") else 0)


def test_every_preset_is_tested():
    assert set(PRESETS) == set(PUBLISHED) | {"embedded"} | set(EMOJI)


# name -> task: what a task's page trains on the embedded set
EMOJI = {"emoji-inpainting": "inpainting", "emoji-semantic": "semantic", "emoji-layout": "layout"}


@pytest.mark.parametrize("name", EMOJI)
def test_presets_of_tasks_differ_from_the_embedded_one_where_they_must(name):
    config, plain = from_preset(name), from_preset("embedded")
    assert config.task == EMOJI[name]
    assert (config.data, config.autoencoder, config.image_size) == ("embedded", "embedded", 64)
    free = {
        "preset",
        "task",
        "palette",
        "start_from",
        "model",
        "batch_size",
        "steps",
        "label_dropout",
        "guidance_scale",
    }
    assert set(plain.different_curve(config.as_dict())) <= free
    assert (config.label_dropout, config.guidance_scale) == (0.0, 1.0)


def test_no_argument_means_the_embedded_preset():
    config = parse_args([])
    assert (config.preset, config.data, config.autoencoder, config.model) == (
        "embedded",
        "embedded",
        "embedded",
        "DiT-Emoji/4",
    )
    assert (config.image_size, config.batch_size, config.label_dropout) == (64, 128, 0.1)


def test_every_field_is_a_flag_with_help():
    flags = {action.dest: action for action in build_parser()._actions}
    for field in dataclasses.fields(TrainConfig):
        assert field.name in flags
        assert len(flags[field.name].help) > 10


def test_flags_go_over_the_preset():
    config = parse_args(["--preset", "imagenet256-dit-b2", "--batch-size", "64", "--data", "photos", "--no-flip"])
    assert (config.batch_size, config.data, config.flip, config.learning_rate) == (64, "photos", False, 1e-4)


def test_steps_and_epochs_replace_each_other():
    assert parse_args(["--epochs", "3"]).steps is None
    config = parse_args(["--preset", "ffhq256-dit-l2", "--steps", "10"])
    assert (config.steps, config.epochs) == (10, None)


BAD = [
    ({"batch_size": 0}, "batch_size is 0"),
    ({"steps": 0}, "steps is 0"),
    ({"steps": None}, "neither was given"),
    ({"steps": 5, "epochs": 5.0}, "both were"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ({"learning_rate": math.nan}, "learning_rate is nan"),
    ({"learning_rate": math.inf}, "learning_rate is inf"),
    ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ({"weight_decay": math.nan}, "weight_decay is nan"),
    ({"ema_decay": 1.0}, "ema_decay is 1.0"),
    ({"label_dropout": 1.5}, "label_dropout is 1.5"),
    ({"precision": "fp7"}, "precision is 'fp7'; there is auto, fp32, tf32, bf16, bf16-pure and fp8"),
    ({"task": "drawing"}, "task is 'drawing'; there is unconditional, labelled"),
    ({"schedule": "linear"}, "schedule is 'linear'"),
    ({"compile": "yes"}, "compile is 'yes'"),
    ({"path": "curved"}, "path is 'curved'"),
    ({"time_sampler": "beta"}, "time_sampler is 'beta'"),
    ({"task": "labelled", "num_classes": 0}, "num_classes is 0"),
    ({"num_classes": -1}, "num_classes is -1"),
    ({"conditions": "maps"}, "no task that would read them; give --task semantic or --task layout"),
    ({"checkpoint_every": 0}, "checkpoint_every is 0"),
    ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**63}, "below 2\\^63"),
    ({"path": "ve", "sigma_min": 0.0}, "ve path"),
    ({"sigma_min": 1.0}, "sigma_min is 1.0"),
    ({"preset": "imagenet"}, "preset is 'imagenet'"),
    ({"steps": None, "epochs": math.inf}, "epochs is inf; it must be a finite number"),
    ({"guidance_scale": math.nan}, "guidance_scale is nan"),
    ({"guidance_scale": math.inf}, "guidance_scale is inf"),
    ({"path": "ve", "sigma_max": math.inf}, "sigma_max is inf"),
    ({"batch_size": "8"}, "batch_size is '8'; it must be a whole number"),
    ({"batch_size": True}, "batch_size is True"),
    ({"learning_rate": None}, "learning_rate is None"),
    ({"model": 5}, "model is 5; it must be text"),
    ({"precision": ["fp32"]}, "precision is .*; it must be text"),
    ({"flip": 1}, "flip is 1; it must be true or false"),
]


@pytest.mark.parametrize(("settings", "sentence"), BAD)
def test_a_bad_value_is_one_sentence(settings, sentence):
    merged = {"steps": 5, **settings}
    with pytest.raises(ValueError, match=sentence) as caught:
        TrainConfig(**merged) if settings.get("preset") is None else from_preset(**settings)
    assert "\n" not in str(caught.value)


def test_a_bad_flag_ends_with_status_2_and_the_sentence(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--precision", "fp16"])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "precision is 'fp16'; there is auto, fp32, tf32, bf16, bf16-pure and fp8" in said
    assert len(said.splitlines()) == 2  # the usage in one line: the list of all flags would bury the sentence


def test_flags_are_not_abbreviated_and_the_status_is_documented(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--batch", "8"])
    assert "there is no flag --batch; did you mean --batch-size?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert "Exit status:" in capsys.readouterr().out


def test_settings_survive_json(tmp_path):
    config = from_preset("church256-dit-l2", data="photos")
    resume.write_config(tmp_path, config)
    assert TrainConfig(**resume.settings_of(tmp_path)) == config


def test_same_curve_ignores_what_only_changes_the_outside():
    config = from_preset()
    outside = dataclasses.replace(config, output="elsewhere", checkpoint_every=7, resume="never", samples_per_class=2)
    assert config.different_curve(outside.as_dict()) == []
    other = dataclasses.replace(config, seed=1, batch_size=64)
    assert config.different_curve(other.as_dict()) == ["batch_size", "seed"]


def test_constant_rate_after_linear_warm_up():
    config = TrainConfig(steps=100, learning_rate=1e-3, warmup_steps=4)
    rates = [learning_rate(config, step, 50) for step in range(6)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_cosine_by_steps_goes_from_the_rate_to_the_final_one():
    config = TrainConfig(steps=101, learning_rate=1e-3, final_learning_rate=1e-5, schedule="cosine")
    rates = [learning_rate(config, step, 50) for step in range(101)]
    assert (rates[0], rates[50], rates[100]) == pytest.approx((1e-3, (1e-3 + 1e-5) / 2, 1e-5))
    assert rates == sorted(rates, reverse=True)


def test_cosine_by_epochs_is_constant_within_an_epoch():
    config = TrainConfig(epochs=4, batch_size=10, learning_rate=2e-4, final_learning_rate=1e-5, schedule="cosine")
    rates = [learning_rate(config, step, 100) for step in range(40)]
    assert len(set(rates)) == 4
    # after k of 4 epochs: 1e-5 + (2e-4 - 1e-5) (1 + cos(pi k / 4)) / 2
    assert rates[::10] == pytest.approx([1e-5 + 1.9e-4 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


@pytest.mark.parametrize(("epochs", "items", "steps"), [(2, 100, 20), (2.5, 100, 25), (1, 101, 11), (0.01, 10, 1)])
def test_epochs_become_steps(epochs, items, steps):
    assert total_steps(TrainConfig(epochs=epochs, batch_size=10), items) == steps


@pytest.mark.parametrize(
    ("mode", "steps", "tools", "kernels", "compiled"),
    [
        ("auto", 300, True, False, ["block"]),
        ("auto", 300, True, True, []),
        ("auto", 299, True, False, []),
        ("auto", 300, False, False, []),
        ("off", 300, True, False, []),
        ("block", 1, False, True, ["block"]),
        ("full", 1, False, True, ["velocity"]),
    ],
)
def test_compiles_on_a_cpu_where_it_pays_and_can(mode, steps, tools, kernels, compiled, monkeypatch):
    seen = []
    monkeypatch.setattr(DiT, "compile", lambda model, part="velocity": seen.append(part))
    monkeypatch.setattr(compiling, "can_compile_for_cpu", lambda: tools)
    monkeypatch.setattr(_library, "load", lambda: None if kernels else "there is no library")
    model = DiT(image_size=4, hidden_size=16, depth=2, num_heads=2)
    compiling.compile_network(model, from_preset("embedded", compile=mode, steps=steps), torch.device("cpu"))
    assert seen == compiled


def test_a_run_goes_on_only_with_what_shapes_its_loss():
    """Each of these set otherwise gives other losses: a run of the old value must not be continued."""
    shaping = [
        "data",
        "max_items",
        "flip",
        "model",
        "image_size",
        "task",
        "num_classes",
        "autoencoder",
        "batch_size",
        "steps",
        "epochs",
        "learning_rate",
        "final_learning_rate",
        "schedule",
        "warmup_steps",
        "weight_decay",
        "beta2",
        "clip_grad_norm",
        "precision",
        "ema_decay",
        "label_dropout",
        "path",
        "sigma_min",
        "sigma_max",
        "time_sampler",
        "seed",
    ]
    config = from_preset("embedded")
    for name in shaping:
        assert config.different_curve({**config.as_dict(), name: "another"}) == [name]


def test_the_readme_trains_photographs_with_a_vae_made_for_them():
    readme = (Path(lfm_fast.__file__).parent.parent / "README.md").read_text().replace("\\\n", " ")
    commands = re.findall(r"^(?:torchrun|python)[^\n]* train_fast.py ([^\n#]*)", readme, re.MULTILINE)
    own = [parse_args(shlex.split(command)) for command in commands if "--data" in command]
    assert len(own) == 2
    for config in own:
        assert config.autoencoder == "stabilityai/sd-vae-ft-mse"
        assert config.learning_rate <= 2e-4  # the embedded preset's 1e-3 suits its small network alone


def test_blocks_of_another_network_are_compiled_one_by_one(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: seen.append(module))
    network = torch.nn.Module()
    network.blocks = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
    compiling.compile_network(network, from_preset("embedded", compile="block"), torch.device("cpu"))
    assert seen == list(network.blocks)
    compiling.compile_network(network, from_preset("embedded", compile="full"), torch.device("cpu"))
    assert seen[2:] == [network]
