"""Train the VAE that ships inside the package, on the embedded data set, and measure it on the held-out images.

    python scripts/train_embedded_vae.py --output FOLDER

The loss is reconstruction (L1, squared error and the L1 of spatial differences, which keeps outlines sharp) plus a
small KL term that keeps latents near unit variance and smooth enough for a small flow to learn. Images that every tenth
code point holds out are seen by the measurement alone.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from lfm_fast import pictures
from lfm_fast.autoencoder import Autoencoder, SmallVAE
from lfm_fast.data import open_images

KL_WEIGHT = 0.005
SHIFT = 4  # pixels: the largest random displacement


def augmented(images, generator):
    """(B, 3, H, W) uint8 -> [-1, 1] with random shifts, mirroring and, now and then, permuted colour channels."""
    batch, _, height, width = images.shape
    padded = F.pad(images.float() / 127.5 - 1, (SHIFT,) * 4, value=1.0)
    out = torch.empty(batch, 3, height, width)
    for i in range(batch):
        top, left = torch.randint(0, 2 * SHIFT + 1, (2,), generator=generator).tolist()
        image = padded[i, :, top : top + height, left : left + width]
        mirrored, recoloured = torch.rand(2, generator=generator).tolist()
        image = image.flip(-1) if mirrored < 0.5 else image
        out[i] = image[torch.randperm(3, generator=generator)] if recoloured < 0.3 else image
    return out.to(memory_format=torch.channels_last)


def loss_of(network, images, generator):
    """Reconstruction + KL_WEIGHT * KL(q(z | image) || N(0, I)), the latter as a mean over latent elements."""
    distribution = network.encode(images).latent_dist
    mean, log_variance = distribution.mean.float(), distribution.logvar.float()
    z = mean + torch.exp(0.5 * log_variance) * torch.randn(mean.shape, generator=generator)
    error = network.decode(z).sample.float() - images
    differences = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    reconstruction = error.abs().mean() + 2 * error.square().mean() + 0.5 * differences
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return reconstruction + KL_WEIGHT * kl


def train(source, steps, batch_size, seed, amp):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images = source.batch(range(len(source)))  # (N, 3, H, W) uint8: small enough to keep
    network = SmallVAE().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.5e-3, betas=(0.9, 0.95), weight_decay=0, fused=True)
    average = {key: value.clone() for key, value in network.state_dict().items()}
    order = torch.empty(0, dtype=torch.long)
    for step in tqdm(range(steps), desc="training the VAE", unit="step", mininterval=10):
        if len(order) < batch_size:
            order = torch.randperm(len(images), generator=generator)
        chosen, order = order[:batch_size], order[batch_size:]
        rate = 1.5e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps) + 0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = loss_of(network, augmented(images[chosen], generator), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        for key, value in network.state_dict().items():
            average[key].lerp_(value, 1 - min(0.998, (1 + step) / (10 + step)))
    network.load_state_dict(average)
    return network


def batches(source, size=64):
    for start in range(0, len(source), size):
        yield source.batch(range(start, min(start + size, len(source)))).float() / 127.5 - 1


def measure(autoencoder, source):
    """PSNR and SSIM (means over images; SSIM with torchmetrics' defaults) and the latents' statistics."""
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    psnr, similarity, means, deviations = [], [], [], []
    for images in batches(source):
        posterior = autoencoder.encode(images)
        decoded = autoencoder.decode(posterior.mode())
        squared = ((decoded - images) / 2).square().mean((1, 2, 3))
        psnr.append(-10 * torch.log10(squared))
        similarity.append(ssim((decoded + 1) / 2, (images + 1) / 2, data_range=1.0, reduction="none").flatten())
        means.append(posterior.mean)
        deviations.append(torch.exp(0.5 * posterior.log_variance))
    mean = torch.cat(means)
    return {
        "images": len(source),
        "psnr_db": round(torch.cat(psnr).mean().item(), 2),
        "ssim": round(torch.cat(similarity).mean().item(), 4),
        "latent_std": round(mean.std().item(), 4),
        "latent_std_per_channel": [round(value, 4) for value in mean.std((0, 2, 3)).tolist()],
        "latent_mean_per_channel": [round(value, 4) for value in mean.mean((0, 2, 3)).tolist()],
        "posterior_std": round(torch.cat(deviations).mean().item(), 4),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights, measurements and a picture")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    args = parser.parse_args()
    source = open_images("embedded", args.image_size, split="train")
    held_out = open_images("embedded", args.image_size, split="held_out")
    started = time.time()
    network = train(source, args.steps, args.batch_size, args.seed, args.precision == "bf16")
    seconds = time.time() - started
    unscaled = measure(Autoencoder(network, "embedded"), source)
    network.config["scaling_factor"] = round(1 / unscaled["latent_std"], 4)
    network.save_pretrained(args.output)
    autoencoder = Autoencoder(SmallVAE.from_pretrained(args.output), "embedded")  # measure what was written
    report = {
        "recipe": {**{k: v for k, v in vars(args).items() if k != "output"}, "kl_weight": KL_WEIGHT},
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in network.parameters()),
        "train": measure(autoencoder, source),
        "held_out": measure(autoencoder, held_out),
    }
    (args.output / "measured.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))
    images = next(iter(batches(held_out)))[:40]
    rows = torch.stack(
        [images.unflatten(0, (2, 20)), autoencoder.decode(autoencoder.encode(images).mode()).unflatten(0, (2, 20))], 1
    )
    pictures.grid((rows.flatten(0, 2) + 1) / 2, columns=20).save(args.output.parent / "vae_held_out.png")


if __name__ == "__main__":
    main()
