"""Autoencoders: encoding and decoding by sd-vae's network and by the embedded one.

As a script, for a GPU above all: `python -m benchmarks.autoencoders [--batch-size 64] [--output FILE.json]`.
"""

import argparse
import functools
import importlib.util
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lfm_fast
from benchmarks.graphs import in_turns
from benchmarks.names import AGAIN, COMPILED, DIFFUSERS, DIFFUSERS_COMPILED, EAGER, FAST, FAST_COMPILED, REFERENCE
from benchmarks.plain import WITHOUT_OPS, forced
from benchmarks.workloads import Contender, Workload, relative_error
from lfm_fast.autoencoder import Autoencoder, load_autoencoder
from lfm_fast.checkpoint import atomic_write
from lfm_fast.models.kl_autoencoder import KLAutoencoder

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}
WIDTHS = {"sd-vae": (128, 256, 512, 512), "narrow": (32, 64)}  # the published network's, and one for quick runs
TRITON = "fast path, norms in Triton"


def network(name: str) -> nn.Module:
    """float32. sd-vae's shape has drawn weights, norms that scale and shift among them; the embedded one its own.

    diffusers' class where it is installed; elsewhere ours of the same names and shapes.
    """
    if name == "embedded":
        return load_autoencoder("embedded").network
    levels = len(WIDTHS[name])
    config = {"block_out_channels": WIDTHS[name], "layers_per_block": 2, "norm_num_groups": 32, "latent_channels": 4}
    config["down_block_types"] = ("DownEncoderBlock2D",) * levels
    config["up_block_types"] = ("UpDecoderBlock2D",) * levels
    torch.manual_seed(0)
    if has_diffusers():
        from diffusers import AutoencoderKL

        kl = AutoencoderKL(**config)
    else:
        kl = KLAutoencoder(config)
        kl.config = {**config, "scaling_factor": 0.18215}
    generator = torch.Generator().manual_seed(1)
    for module in kl.modules():
        if isinstance(module, nn.GroupNorm):
            module.weight.data += 0.2 * torch.randn(module.weight.shape, generator=generator)
            module.bias.data += 0.2 * torch.randn(module.bias.shape, generator=generator)
    return kl.eval().requires_grad_(False)


def has_diffusers() -> bool:
    return importlib.util.find_spec("diffusers") is not None


def images_of(count: int, side: int) -> Tensor:
    """Smooth pictures in [-1, 1]."""
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return F.interpolate(coarse, size=(side, side), mode="bicubic").clamp(-1, 1)


def run(found: nn.Module, direction: str, x: Tensor) -> list[Tensor]:
    """(mean, log-variance) of images, or images of latents, by a network itself."""
    with torch.no_grad():
        if direction == "decode":
            return [found.decode(x).sample]
        gaussian = found.encode(x).latent_dist
        return [gaussian.mean, gaussian.logvar]


class Autoencoding(Workload):
    """encode(images) or decode(latents) of our `Autoencoder` and of the network by itself, channels innermost in both.

    Ours converts, scales, and clamps images as well.
    """

    profiled = (FAST, DIFFUSERS)

    def __init__(self, name: str, direction: str, batch_size: int, side: int, precision: str):
        self.name, self.direction, self.precision, self.images = name, direction, precision, batch_size
        self.autoencoder = Autoencoder(network(name), name)
        self.x = images_of(batch_size, side)
        if direction == "decode":
            small, channels = side // self.autoencoder.downsampling, self.autoencoder.latent_channels
            self.x = lfm_fast.noise(batch_size, (channels, small, small), seed=0)
        self.flops = batch_size * flops(name, direction, side)

    def contenders(self):
        fast = lfm_fast.optimize(self.autoencoder, PRECISIONS[self.precision])
        plain, plain_name = self._plain(), EAGER if self.name == "embedded" else DIFFUSERS
        return {
            FAST: self._ours(fast),
            REFERENCE: self._ours(fast, "reference"),
            AGAIN: self._ours(fast),
            plain_name: self._by_itself(plain),
        }

    def compiled(self, name):
        plain = self._plain()
        for part in ("encode", "decode"):
            setattr(plain, part, torch.compile(getattr(plain, part)))
        return replace(self._by_itself(plain), how="defaults")

    def truth(self) -> list[Tensor]:
        found = run(network(self.name).double(), self.direction, self._unscaled().double())
        if self.direction == "decode":
            return [found[0].clamp(-1, 1)]
        return found

    def _plain(self) -> nn.Module:
        dtype = getattr(torch, self.precision)
        return network(self.name).to(dtype).to(memory_format=torch.channels_last)

    def _unscaled(self) -> Tensor:
        return self.x / self.autoencoder.scaling_factor if self.direction == "decode" else self.x

    def _by_itself(self, plain) -> Contender:
        x = self._unscaled().to(getattr(torch, self.precision)).contiguous(memory_format=torch.channels_last)

        def result():
            found = run(plain, self.direction, x)
            return [found[0].clamp(-1, 1)] if self.direction == "decode" else found

        return Contender(lambda: run(plain, self.direction, x), result, WITHOUT_OPS)

    def _ours(self, fast: Autoencoder, backend=None) -> Contender:
        if self.direction == "decode":
            return Contender(lambda: fast.decode(self.x), lambda: [fast.decode(self.x)], backend)

        def result():
            posterior = fast.encode(self.x)
            shift = 2 * torch.log(torch.tensor(fast.scaling_factor, dtype=torch.float64))
            return [posterior.mean.double() / fast.scaling_factor, posterior.log_variance.double() - shift]

        return Contender(lambda: fast.encode(self.x), result, backend)


@functools.cache
def flops(name: str, direction: str, side: int) -> int:
    """Of one image; 2 per multiply-add of products and convolutions, as the network's definition has them."""
    found = network(name)
    levels, channels = len(found.config["block_out_channels"]), found.config["latent_channels"]
    small = side // 2 ** (levels - 1)
    shape = (1, channels, small, small) if direction == "decode" else (1, 3, side, side)
    with FlopCounterMode(display=False) as counter, forced(WITHOUT_OPS):
        run(found.to("meta"), direction, torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def measured(
    direction: str, batch_size: int, side: int, precision: str, device, rounds: int, name="sd-vae", **options
) -> dict:
    """Contenders in turns, one call each: as they come, through torch.compile with these options, norms in Triton.

    "failed" of the record: {contender that raised: why}.
    """
    workload = Autoencoding(name, direction, batch_size, side, precision)
    workload.x, workload.autoencoder = workload.x.to(device), workload.autoencoder.to(device)
    found = _on_a_device(workload, device, options)
    exact = run(network(name).to(device).double(), direction, workload._unscaled()[:1].double())
    exact = [exact[0].clamp(-1, 1)] if direction == "decode" else exact
    facts, failed = {}, {}
    for contender_name, contender in found.items():
        try:
            with forced(contender.backend):
                error = relative_error([x[:1] for x in contender.result()], exact)
                facts[contender_name] = {"error": error, "peak_bytes": _peak(contender, device)}
        except Exception as error:  # of a compiler, say: the others are measured
            failed[contender_name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    calls = {each: functools.partial(_forced_call, found[each]) for each in facts}
    for each, seconds in in_turns(calls, device, rounds).items():
        median = statistics.median(seconds)
        rates = {"images_per_second": batch_size / median, "flops_per_second": workload.flops / median}
        facts[each] |= {"seconds": median, "least": min(seconds), **rates}
    title = f"{direction}, {name}, {batch_size} x {side} px, {precision}"
    largest = workload.largest_error([])
    right = not failed and all(each["error"] <= largest for each in facts.values())
    return {"title": title, "largest_error": largest, "right": right, "contenders": facts, "failed": failed}


def _on_a_device(workload: Autoencoding, device, options: dict) -> dict[str, Contender]:
    plain, compiled = (workload._plain().to(device) for _ in range(2))
    for part in ("encode", "decode"):
        setattr(compiled, part, torch.compile(getattr(compiled, part), **options))
    ours = workload.autoencoder.network, workload.name, PRECISIONS[workload.precision]
    fast, whole = (Autoencoder(*ours) for _ in range(2))
    whole.compile(**options)
    eagerly, compiled_whole = (DIFFUSERS, DIFFUSERS_COMPILED) if has_diffusers() else (EAGER, COMPILED)
    found = {
        FAST: workload._ours(fast),
        AGAIN: workload._ours(fast),
        FAST_COMPILED: workload._ours(whole),
        eagerly: workload._by_itself(plain),
        compiled_whole: workload._by_itself(compiled),
    }
    return found | ({TRITON: workload._ours(fast, "triton")} if device.type == "cuda" else {})


def _peak(contender: Contender, device) -> int | None:
    """Bytes that one call holds on a GPU at most."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    contender.call()
    return torch.cuda.max_memory_allocated(device)


def _forced_call(contender: Contender) -> None:
    with forced(contender.backend):
        contender.call()


def text(record: dict) -> str:
    """A line for each contender."""
    lines = [record["title"] + ("" if record["right"] else ": WRONG")]
    for name, found in record["contenders"].items():
        memory = "" if found["peak_bytes"] is None else f", {found['peak_bytes'] / 2**30:.2f} GiB"
        rate, flops = found["images_per_second"], found["flops_per_second"] / 1e12
        lines.append(f"  {name}: {rate:.1f} images/s, {flops:.2f} TFLOP/s, error {found['error']:.1e}{memory}")
    lines += [f"  {name}: not run, {why}" for name, why in record["failed"].items()]
    return "\n".join(lines)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="sd-vae", choices=(*WIDTHS, "embedded"))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--precisions", nargs="+", default=["bfloat16", "float32"], choices=PRECISIONS)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the records to this file")
    given = parser.parse_args(arguments)
    device, records = torch.device(given.device), []
    sizes = given.batch_size, given.side
    for precision in given.precisions:
        for direction in ("encode", "decode"):
            records.append(measured(direction, *sizes, precision, device, given.rounds, given.network))
            print(text(records[-1]), flush=True)
    if given.output is not None:
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        about = {"device": device_name, "torch": torch.__version__, "threads": torch.get_num_threads()}
        with atomic_write(given.output) as temporary:
            temporary.write_text(json.dumps({"about": about, "records": records}, indent=1) + "\n")
    return 0 if all(record["right"] for record in records) else 1


if __name__ == "__main__":
    raise SystemExit(main())
