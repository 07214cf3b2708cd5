"""What a training run is: every setting with its meaning, its check, and the command-line flag made from it."""

import argparse
import dataclasses
import math
from dataclasses import dataclass, field

from lfm_fast._terminal import Parser, one_of
from lfm_fast.data.decoders import DECODERS
from lfm_fast.data.opening import LAYOUTS
from lfm_fast.data.palettes import PALETTES
from lfm_fast.data.stored import CHECKS
from lfm_fast.flow.paths import PATHS
from lfm_fast.flow.time_samplers import TIME_SAMPLERS
from lfm_fast.models import NETWORKS
from lfm_fast.models.checkpointing import MODES
from lfm_fast.tasks import TASKS
from lfm_fast.train.presets import PRESETS

PRECISIONS = ("auto", "fp32", "tf32", "bf16", "bf16-pure", "fp8")
AUTOCAST = ("bf16", "fp8")  # of which the rest of the network is in bf16, weights in float32
SCHEDULES = ("constant", "cosine")
COMPILE = ("auto", "off", "block", "full")
DEVICES = ("auto", "cpu", "cuda")
KEEP_LATENTS = ("auto", "device", "mapped")


def _setting(default, kind, says, choices=None, where="run", flag=None):
    """A field. `where` is "curve" when another value gives another loss curve, "run" when only its outside changes.

    `flag` is its name on the command line where that is another one.
    """
    facts = {"kind": kind, "help": says, "choices": choices, "where": where, "flag": flag}
    return field(default=default, metadata=facts)


def _curve(default, kind, says, choices=None, flag=None):
    return _setting(default, kind, says, choices, where="curve", flag=flag)


@dataclass(kw_only=True)
class TrainConfig:
    """All settings of a training run; the line of each field is also the help of its flag (`--learning-rate` ...)."""

    preset: str = _setting(
        "embedded", str, "where the other settings' defaults come from (default: embedded)", tuple(PRESETS)
    )
    data: str | None = _curve(None, str, "'embedded', images (a folder, LMDB, tars, ...) or a folder of cached latents")
    layout: str | None = _curve(None, str, "how the images lie there; default: what it looks like", LAYOUTS, "--from")
    max_items: int | None = _curve(None, int, "use only the first N images of the data")
    cache_latents: str | None = _setting(None, str, "encode the images into this folder first, once, and train from it")
    keep_latents: str = _setting(
        "auto",
        str,
        "where cached latents are: device, a table in its memory; mapped, files read as they are asked for; auto: the "
        "device where they take at most a quarter of a GPU's free memory, or an eighth of a CPU's",
        KEEP_LATENTS,
    )
    flip: bool = _curve(False, bool, "mirror half of the images at random")
    model: str = _curve("DiT-B/2", str, f"the network; one of {', '.join(NETWORKS)}")
    start_from: str | None = _curve(
        None,
        str,
        "begin with the weights of a flow ('embedded', a folder, a checkpoint); inputs it has not begin at 0",
    )
    image_size: int = _curve(256, int, "side of the images in pixels")
    task: str | None = _curve(None, str, "default: labelled when the data has two or more classes", tuple(TASKS))
    conditions: str | None = _curve(None, str, "folder of what the task conditions on, a file for each image by name")
    palette: str | None = _curve(None, str, f"of label maps; one of {', '.join(PALETTES)}")
    compat: str | None = _curve(None, str, "lfm: train as the reference does where we would not", ("lfm",))
    num_classes: int | None = _curve(None, int, "number of labels, at least the data's; default: the data's")
    autoencoder: str = _curve(
        "stabilityai/sd-vae-ft-mse", str, "'embedded', a folder or a hub name (diffusers' layout)"
    )
    batch_size: int = _curve(256, int, "samples per optimizer step over ALL ranks")
    accumulation_steps: int = _setting(1, int, "split each rank's share of the batch into N passes to save memory")
    steps: int | None = _curve(None, int, "length in optimizer steps (or give epochs)")
    epochs: float | None = _curve(None, float, "length in passes over the data (or give steps)")
    learning_rate: float = _curve(1e-4, float, "AdamW's rate after warm-up")
    final_learning_rate: float = _curve(1e-5, float, "where the cosine schedule ends")
    schedule: str = _curve(
        "constant", str, "of the rate; cosine falls per epoch if epochs are given, else per step", SCHEDULES
    )
    warmup_steps: int = _curve(0, int, "steps over which the rate rises linearly from 0")
    weight_decay: float = _curve(0.0, float, "AdamW's decoupled weight decay")
    beta2: float = _curve(0.999, float, "AdamW's decay of the squared gradients' average")
    clip_grad_norm: float = _curve(0.0, float, "largest norm of the whole gradient; 0 = never clipped")
    precision: str = _curve(
        "auto",
        str,
        "of the network; auto: bf16 on CUDA and CPUs with AMX, else fp32; bf16 keeps its weights in float32, bf16-pure "
        "those of the optimizer alone; tf32 and fp8 are for CUDA",
        PRECISIONS,
    )
    ema_decay: float = _curve(0.9999, float, "decay of the weights' average, reached by warm-up")
    label_dropout: float = _curve(0.0, float, "share of samples whose label is withheld, for guidance")
    path: str = _curve("linear", str, "probability path from data to noise", tuple(PATHS))
    sigma_min: float = _curve(1e-5, float, "smallest noise of the linear and ve paths")
    sigma_max: float = _curve(50.0, float, "largest noise of the ve path")
    time_sampler: str = _curve("uniform", str, "distribution of t", tuple(TIME_SAMPLERS))
    seed: int = _curve(0, int, "of the weights, data order, noise, times and dropout")
    device: str = _setting("auto", str, "where to train", DEVICES)
    compile: str = _setting(
        "auto", str, "torch.compile: auto is block on CUDA, and off on CPUs that have the compiled kernels", COMPILE
    )
    cuda_graph: bool = _setting(
        False, bool, "replay the forward and backward pass as one CUDA graph (one rank; never run on a GPU so far)"
    )
    activation_checkpointing: str = _setting(
        "none", str, "what the backward pass makes again; selective: all but products and attention", MODES
    )
    check_images: str = _setting(
        "decode", str, "of files, once: decode them whole, or read their headers alone", CHECKS
    )
    decoder: str = _setting(
        "auto", str, "of image files: Pillow, or DALI (on the GPU where there is one); auto is the faster", DECODERS
    )
    output: str = _setting("results", str, "folder that holds the numbered run folders")
    resume: str = _setting("auto", str, "auto: go on with an unfinished run of these settings; never; or a path")
    log_every: int = _setting(10, int, "steps between lines of metrics.jsonl")
    sample_every: int = _setting(5000, int, "steps between sample grids; 0 = none")
    samples_per_class: int = _setting(8, int, "pictures in each row of a grid")
    guidance_scale: float = _setting(1.0, float, "of the sample grids (needs label dropout when not 1)")
    checkpoint_every: int = _setting(5000, int, "steps between checkpoints; the last step always saves one")
    keep_checkpoints: int = _setting(3, int, "how many of the newest checkpoints stay on disk")
    dry_run: bool = _setting(False, bool, "print the settings, parameters, FLOPs and memory, and stop")

    def __post_init__(self):
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self):
        """Sentences about what is wrong, the first of which becomes the error."""
        yield from _wrong_kinds(self)
        yield from _wrong_choices(self)
        for name in ("image_size", "batch_size", "accumulation_steps", "log_every", "samples_per_class"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; it must be at least 1"
        for name in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; it must be at least 1, or a kill would lose the whole run"
        for name in ("sample_every", "warmup_steps", "weight_decay", "clip_grad_norm", "seed", "sigma_min"):
            if getattr(self, name) < 0:
                yield f"{name} is {getattr(self, name)}; it must be 0 or more"
        for name in ("steps", "epochs", "max_items"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                yield f"{name} is {getattr(self, name)}; it must be more than 0"
        for name in ("learning_rate", "final_learning_rate"):
            if getattr(self, name) <= 0:
                yield f"{name} is {getattr(self, name)}; it must be a positive number"
        for name in ("ema_decay", "label_dropout", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; it must be in [0, 1)"
        if (self.steps is None) == (self.epochs is None):
            given = "neither was" if self.steps is None else f"both were (steps {self.steps}, epochs {self.epochs})"
            yield f"the length of a run is given by steps or by epochs, but {given} given"
        if self.num_classes is not None and self.num_classes < 0:
            yield f"num_classes is {self.num_classes}; it must be 0 (no labels) or more"
        if self.task == "labelled" and self.num_classes == 0:
            yield "task is labelled but num_classes is 0; give the number of labels or use --task unconditional"
        if self.conditions is not None and self.task in (None, "unconditional", "labelled"):
            yield "conditions is given, but no task that would read them; give --task semantic or --task layout"
        if self.seed >= 2**63:
            yield f"seed is {self.seed}; it must be below 2^63"
        if self.path == "ve" and not 0 < self.sigma_min < self.sigma_max:
            yield f"the ve path needs 0 < sigma_min < sigma_max; got {self.sigma_min} and {self.sigma_max}"
        if self.path == "linear" and self.sigma_min >= 1:
            yield f"sigma_min is {self.sigma_min}; on the linear path it must be below 1"

    def as_dict(self):
        return dataclasses.asdict(self)

    def different_curve(self, other):
        """Names of settings that differ from `other` (a dict) and that change the loss curve."""
        names = [f.name for f in dataclasses.fields(self) if f.metadata["where"] == "curve"]
        return [name for name in names if getattr(self, name) != other.get(name)]


def _wrong_kinds(config):
    """A file or a caller may give anything; the checks after this one may compare."""
    for setting in dataclasses.fields(config):
        value, kind = getattr(config, setting.name), setting.metadata["kind"]
        if value is None and setting.default is None:
            continue
        if not isinstance(value, (int, float) if kind is float else kind) or (
            isinstance(value, bool) and kind is not bool
        ):
            yield f"{setting.name} is {value!r}; it must be {_KINDS[kind]}"
        elif kind is float and not math.isfinite(value):
            yield f"{setting.name} is {value}; it must be a finite number"


_KINDS = {int: "a whole number", float: "a finite number", str: "text", bool: "true or false"}


def _wrong_choices(config):
    for setting in dataclasses.fields(config):
        value, choices = getattr(config, setting.name), setting.metadata["choices"]
        if choices and value is not None and value not in choices:
            yield f"{setting.metadata['flag'] or setting.name} is {value!r}; there is {_listed(choices)}"


def _listed(names):
    return ", ".join(names[:-1]) + " and " + names[-1]


def from_preset(preset="embedded", **settings):
    """The preset's settings with `settings` over them. Raises ValueError with one sentence for a bad one."""
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; there is {_listed(tuple(PRESETS))}")
    return TrainConfig(**{"preset": preset, **_over(PRESETS[preset], settings)})


def _over(base, settings):
    """`base` with `settings` over it; a length given in steps replaces one in epochs, and the other way round."""
    merged = {**base, **settings}
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if settings.get(name) is not None and settings.get(other) is None:
            merged[other] = None
    return merged


def _known(settings):
    """`settings` of an earlier run. Raises ValueError if another version, with other settings, wrote them."""
    unknown = sorted(set(settings) - {setting.name for setting in dataclasses.fields(TrainConfig)})
    if unknown:
        raise ValueError(f"the run to resume has settings this version does not know ({', '.join(unknown)})")
    return settings


def build_parser(prog=None):
    """One flag per field; a flag not given is absent, so that the preset or the resumed run supplies it."""
    parser = Parser(
        prog=prog,
        description="Train a latent flow. A flag that is left out is what the preset says, and without a preset what "
        "'embedded' says: pictures of 64 pixels and networks for minutes on a CPU. --dry-run shows them all.",
        epilog="Exit status: 0 finished, or stopped by a signal and saved; 2 settings, data or files that cannot work; "
        "1 any other failure (a disk, a loss that is not finite); 130 interrupted twice.",
    )
    for setting in dataclasses.fields(TrainConfig):
        kind, says, names = (setting.metadata[key] for key in ("kind", "help", "choices"))
        flag = setting.metadata["flag"] or "--" + setting.name.replace("_", "-")
        if kind is bool:
            action = argparse.BooleanOptionalAction if setting.name != "dry_run" else "store_true"
            parser.add_argument(flag, action=action, default=argparse.SUPPRESS, help=says)
        else:
            shown = one_of(names, says) if names else {"metavar": kind.__name__.upper(), "help": says}
            parser.add_argument(flag, dest=setting.name, type=kind, default=argparse.SUPPRESS, **shown)
    return parser


def parse_args(argv=None, prog=None):
    """The `TrainConfig` of a command line. A bad value ends the program with one sentence and status 2.

    With `--resume PATH` the settings come from that run, and flags given go over them.
    """
    parser = build_parser(prog)
    given = vars(parser.parse_args(argv))
    try:
        if given.get("resume", "auto") in ("auto", "never"):
            return from_preset(given.pop("preset", "embedded"), **given)
        from lfm_fast.train.resume import settings_of  # resume reads configurations, so it cannot be imported above

        return TrainConfig(**_over(_known(settings_of(given["resume"])), given))
    except ValueError as error:
        return parser.error(str(error))
