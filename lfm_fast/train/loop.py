"""The training run: open the data, build or resume the state, step, and leave metrics, grids and checkpoints."""

import contextlib
import copy
import dataclasses
import shlex
import sys
import time
from pathlib import Path

import torch

from lfm_fast import distributed
from lfm_fast.checkpoint import check_output
from lfm_fast.flow import paths
from lfm_fast.models import NETWORKS, create_model, num_parameters
from lfm_fast.models.checkpointing import set_mode
from lfm_fast.models.fp8 import train_in_fp8, why_not_sizes
from lfm_fast.models.inherit import inherit
from lfm_fast.models.precision import why_not
from lfm_fast.pipeline.folders import read_network_of
from lfm_fast.tasks import task_named
from lfm_fast.train import memory, report, resume
from lfm_fast.train.commands import command
from lfm_fast.train.compiling import compile_network
from lfm_fast.train.ema import EMA
from lfm_fast.train.graphed import GraphedGradients
from lfm_fast.train.journal import Journal, read_metrics
from lfm_fast.train.optimizer import AdamW
from lfm_fast.train.origin import origin_of, require_one
from lfm_fast.train.samples import SAMPLING, columns, sample_grid, save_grid
from lfm_fast.train.schedule import learning_rate, total_steps
from lfm_fast.train.source import check_settings, check_source, facts, open_source, resolve_labels
from lfm_fast.train.step import TrainState, gradients_on, train_step
from lfm_fast.train.stop import StopSignals, sigterm_put_back


@sigterm_put_back()
def main(config):
    """Run the command line's configuration; returns the exit status: 2 for the user's mistakes, 1 for other failures.

    Either is one sentence.
    """
    try:
        train(config)
    except (ValueError, OSError, FloatingPointError, distributed.PeerLost) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except (RuntimeError, MemoryError) as error:
        if memory.too_little(error) is None:
            raise
        print(f"error: {memory.too_little(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; checkpoints written before are whole", file=sys.stderr)
        return 130
    return 0


@sigterm_put_back()
def train(config, source=None, autoencoder=None):
    """Train as `config` says and return the run folder (None after a dry run).

    `source` (see `lfm_fast.data.latents`) and `autoencoder` replace what `config.data` and `config.autoencoder` name;
    a source without an autoencoder trains without sample grids. Raises ValueError for settings that cannot work,
    FloatingPointError when the loss stops being finite, OSError when the last checkpoint cannot be written.
    """
    _refuse_empty(config)
    if source is None:
        _check_network(config)
    world = distributed.start(config.device)
    try:
        config = dataclasses.replace(config, precision=resolve_precision(config.precision, world.device))
        if config.dry_run:
            if world.is_main:
                num_items, num_classes, latent_shape, table = facts(config, world)
                config = resolve_labels(config, num_classes)
                check_settings(config, latent_shape, world)
                print(report.describe(config, world, latent_shape, num_items, table))
            return None
        _check_outputs(config)
        if source is None:
            source, autoencoder = open_source(config, world)
        config = resolve_labels(config, source.num_classes)
        check_source(config, source, world)
        require_one(origin_of(source), config, world)
        folder = _run(config, source, autoencoder, world)
        world.barrier()  # no rank takes its connections away while another still writes the last checkpoint
        return folder
    except RuntimeError as error:
        if isinstance(error, distributed.PeerLost) or not distributed.is_of_lost_peer(error):
            raise
        raise distributed.PeerLost() from error
    finally:
        world.close()


def _refuse_empty(config):
    """An empty text, a shell variable that is not set, would be the current folder."""
    for name in ("data", "cache_latents", "autoencoder", "start_from", "output"):
        if getattr(config, name) == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty; give a name or a folder, or leave it out")


def _check_network(config):
    """Raise ValueError before images are read and encoded if the name of the network says that it cannot be trained."""
    if config.model not in NETWORKS:
        create_model(config.model)  # says which there are
    start = config.start_from
    if start not in (None, "embedded") and not Path(start).expanduser().exists():
        raise ValueError(f"--start-from {start} does not exist; give 'embedded', a flow's folder or a checkpoint")
    if NETWORKS[config.model][0].condition_argument == "context" and config.task != "layout":
        raise ValueError(
            f"--model {config.model} looks at a context, which task layout alone brings; give that, or another network"
        )


def _check_outputs(config):
    """Raise ValueError before images are read and encoded if what comes of them could not be written."""
    if config.resume in ("auto", "never"):
        check_output(config.output)
    if config.cache_latents is not None:
        check_output(config.cache_latents, "--cache-latents")


def resolve_precision(precision, device):
    """What "auto" means on `device`. Raises ValueError for a precision that it does not compute in."""
    reason = why_not(precision, device)
    if reason is not None:
        raise ValueError(reason)
    if precision != "auto":
        return precision
    fast = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def build_state(config, source, world):
    """A fresh `TrainState`: weights by the seed alone, so equal on all ranks."""
    torch.manual_seed(config.seed)
    task = task_named(config.task)
    model = task.network(config, source.latent_shape)
    if config.start_from is not None:
        _start_from(config, model)
    model.to(world.device)
    ema = EMA(model, config.ema_decay)  # before compiling: sampling uses other batch sizes
    network, copies = _for_precision(model, config.precision)
    set_mode(network, config.activation_checkpointing)
    compile_network(network, config, world.device)
    if world.size > 1:
        cuda = world.device.type == "cuda"
        network = torch.nn.parallel.DistributedDataParallel(
            network,
            device_ids=[world.device] if cuda else None,
            process_group=None if cuda else world.control,  # the other one gives up on a rank that takes half an hour
            gradient_as_bucket_view=True,
        )
    optimizer = AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
    )
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    flow = {
        "path": paths.describe(training_path(config)),
        "autoencoder": config.autoencoder,
        "class_names": list(source.class_names) if config.num_classes else [],
        "sampling": {**SAMPLING, "guidance_scale": config.guidance_scale},
        "task": {"name": config.task, **task.settings(config)},
    }
    return TrainState(model, network, optimizer, ema, copies, flow=flow, origin=origin_of(source), loss_sum=loss_sum)


def _start_from(config, model):
    """Begin with the weights of a trained flow. Raises ValueError for one of another network or path."""
    other, path = read_network_of(config.start_from)
    if not paths.agree(path, training_path(config)):
        raise ValueError(f"--start-from {config.start_from} was trained on {path!r}; train on the same path")
    inherit(model, other)


def _for_precision(model, precision):
    """What a step calls, and the copies of the model's Parameters that it has where it is another network."""
    if precision == "fp8":
        reason = why_not_sizes(model)
        if reason is not None:
            raise ValueError(reason)
        train_in_fp8(model)
    if precision != "bf16-pure":
        return model, None
    network = copy.deepcopy(model).to(torch.bfloat16)
    pairs = zip(model.parameters(), network.parameters(), strict=True)
    return network, {parameter: low for parameter, low in pairs if parameter.requires_grad}


def training_path(config):
    """The probability path that the settings name, with those of its arguments that are settings."""
    arguments = {field.name for field in dataclasses.fields(paths.PATHS[config.path])} & set(config.as_dict())
    return paths.make_path(config.path, **{name: getattr(config, name) for name in sorted(arguments)})


def _run(config, source, autoencoder, world):
    steps, path = total_steps(config, source.num_items), training_path(config)
    state = build_state(config, source, world)
    folder, candidates = world.from_main(lambda: resume.choose_run(config, steps, state.origin))
    try:
        journal = Journal(folder, active=world.is_main)
        checkpoint = world.from_main(lambda: resume.newest_whole(candidates, journal.say))
        if checkpoint is not None:
            resume.restore(checkpoint, state, world)
            if world.is_main:
                resume.warn_of_another_unit(checkpoint, autoencoder)
        elif config.resume not in ("auto", "never"):
            raise ValueError(f"--resume {config.resume}: none of its checkpoints can be read")
        elif candidates:
            damaged = folder
            folder = world.from_main(lambda: resume.start_anew(config, instead_of=damaged))
            journal = Journal(folder, active=world.is_main)
        if config.cuda_graph:
            add_gradients = gradients_on(state, config, path, world, source)
            state.graph = GraphedGradients(add_gradients, state.trained, world.device)
        if world.is_main:
            resume.truncate_metrics(folder, state.step)
            resume.write_config(folder, config)
        run = Run(config, world, state, source, autoencoder, path, folder, journal, steps)
        run.announce(checkpoint)
        run.go()
    except RuntimeError as error:
        if not distributed.is_of_lost_peer(error):
            raise
        made = resume.run_checkpoints(folder)
        then = f"go on from {made[0]} with --resume {folder}" if made else "no checkpoint had been written yet"
        raise distributed.PeerLost(then) from error
    finally:
        if world.is_main:
            resume.unlock(folder)
    return folder


class Run:
    """A training run under way: the state and where it reports to."""

    def __init__(self, config, world, state, source, autoencoder, path, folder, journal, steps):
        self.config, self.world, self.state = config, world, state
        self.source, self.autoencoder, self.path = source, autoencoder, path
        self.folder, self.journal, self.steps = folder, journal, steps
        self.flops_per_step = 3 * state.model.flops_per_sample() * config.batch_size
        self.peak_flops = report.peak_flops(world.device, config.precision)
        lines = read_metrics(folder) if world.is_main else []
        self.seconds = lines[-1].get("seconds", 0.0) if lines else 0.0  # of training, over all starts of this run
        self.interval_seconds, self.interval_steps = 0.0, 0
        self.first_step = state.step

    def announce(self, checkpoint):
        state, config = self.state, self.config
        fresh = "fresh weights" if config.start_from is None else f"the weights of {config.start_from}"
        start = f"going on from {checkpoint}" if checkpoint else f"from {fresh}"
        self.journal.say(
            f"Training {config.model} ({num_parameters(state.model) / 1e6:.1f} M parameters) on "
            f"{self.source.num_items} items of {config.data}, {self.steps} steps of {config.batch_size}, "
            f"{config.precision} on {self.world.size} x {self.world.device.type}, {start}, writing to {self.folder}"
        )

    def go(self):
        """Step until the end or until asked to stop."""
        state, config = self.state, self.config
        self.journal.open_bar(self.steps, state.step)
        with StopSignals(self.world) as stop:
            if state.step == 0:
                self.make_grid()
            while state.step < self.steps:
                with self.steps_before_saved():
                    self.step()
                    stopping = stop.asked()
                    last = state.step == self.steps
                    if last or state.step % config.log_every == 0:
                        self.write_metrics()
                    if (last or _due(state.step, config.sample_every)) and not stopping:
                        self.make_grid()
                if last or stopping or _due(state.step, config.checkpoint_every):
                    self.save(must=last or stopping)
                if stopping and not last:
                    self.say_how_to_go_on()
                    break
            else:
                self.journal.say(f"Finished {self.steps} steps; the checkpoint is {self.checkpoint}")
        self.journal.close()

    @property
    def checkpoint(self):
        return resume.checkpoint_path(self.folder, self.state.step)

    def step(self):
        began = time.perf_counter()
        for group in self.state.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.state.step, self.source.num_items)
        train_step(self.state, self.source, self.config, self.path, self.world)
        self.interval_seconds += time.perf_counter() - began
        self.interval_steps += 1
        self.journal.advance()

    def write_metrics(self):
        """One line: means over the steps since the last line; rates count the time spent in steps alone."""
        state, config = self.state, self.config
        loss, grad_norm = self.finite_losses()
        loss /= state.loss_steps
        state.loss_sum.zero_()
        state.loss_steps = 0
        steps_per_s = self.interval_steps / self.interval_seconds
        waited, state.data_seconds = state.data_seconds / self.interval_seconds, 0.0
        self.seconds += self.interval_seconds
        self.interval_seconds, self.interval_steps = 0.0, 0
        values = {
            "step": state.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": state.optimizer.param_groups[0]["lr"],
            "epoch": state.samples / self.source.num_items,
            "images_per_s": steps_per_s * config.batch_size,
            "steps_per_s": steps_per_s,
            "data_share": waited,
            "memory_gb": report.memory_used(self.world.device) / 1e9,
            "seconds": self.seconds,
        }
        if self.peak_flops:
            values["mfu"] = steps_per_s * self.flops_per_step / (self.peak_flops * self.world.size)
        self.journal.metrics(**values)
        self.journal.progress(values, self.steps)

    def finite_losses(self):
        """(sum of the losses not yet logged over all ranks, last gradient norm); raises when not finite."""
        loss, grad_norm = float(self.world.sum(self.state.loss_sum)), float(self.state.grad_norm)
        if not (abs(loss) < float("inf") and grad_norm < float("inf")):
            saved = resume.run_checkpoints(self.folder)
            raise FloatingPointError(
                f"the loss is no longer finite at step {self.state.step} (loss {loss}, gradient norm {grad_norm}); "
                + (f"{saved[0]} is from before; " if saved else "no checkpoint had been written yet; ")
                + "try a lower learning rate or --precision fp32"
            )
        return loss, grad_norm

    def make_grid(self):
        if self.autoencoder is None or not self.config.sample_every:
            return
        images, captions = sample_grid(self.state, self.source, self.autoencoder, self.config, self.path, self.world)
        if self.world.is_main:
            file = self.folder / "samples" / f"{self.state.step:07d}.png"
            self.journal.attempt(file, lambda: save_grid(file, images, columns(self.config), captions))

    def save(self, must):
        """Write a checkpoint. A failure ends the run only if `must`: the next one may find room again."""
        state, world = self.state, self.world
        loss, _ = self.finite_losses()
        state.loss_sum.fill_(loss if world.is_main else 0.0)  # the same sum, now all of it on rank 0
        if world.is_main:
            try:
                resume.save_checkpoint(self.folder, state, self.config)
                resume.keep_newest(self.folder, self.config.keep_checkpoints, state.step)
            except OSError as error:
                if must:
                    raise
                self.journal.say(f"Training goes on, but {error}")

    @contextlib.contextmanager
    def steps_before_saved(self):
        """Save what the run has done since the last checkpoint before it ends by an error of the data, of which a step
        that cannot read it has done nothing; one rank of several cannot, since the others wait for its gradients."""
        try:
            yield
        except (ValueError, OSError):
            if self.world.size == 1 and self.state.step > max(self.first_step, resume.newest_step(self.folder)):
                with contextlib.suppress(OSError, FloatingPointError):  # the error itself is what has to be said
                    self.save(must=True)
                    self.journal.say(f"Saved {self.checkpoint}, the state before what fails.")
            raise

    def say_how_to_go_on(self):
        words = shlex.join([*_program(self.world), "--resume", str(self.folder)])
        self.journal.say(f"Stopped after step {self.state.step} and saved {self.checkpoint}. To go on: {words}")


def _program(world):
    """The words that start this program again with as many ranks on this machine."""
    called = Path(sys.argv[0] if sys.argv else "")
    if called.name == "lfm-fast":
        return [command("lfm-fast"), "train"]
    ranks = ["--nproc-per-node", str(world.local_size)]
    launcher = [command("torchrun"), *ranks] if world.size > 1 else [command("python")]
    if called.parts[-2:] == ("cli", "__main__.py"):
        return [*launcher, "-m", "lfm_fast.cli", "train"]
    return [*launcher, str(called) if called.name == "train_fast.py" else "train_fast.py"]  # others take other flags


def _due(step, every):
    return every > 0 and step % every == 0
