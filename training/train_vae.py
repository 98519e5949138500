"""Train the small autoencoder on all training images; report PSNR on the held-out ones.

Loss: L1 + L1 of image gradients (edges) + a light KL term. Afterwards the latents' mean and standard deviation
are measured per channel and folded into the 1x1 quantisation convolutions, so the diffusion models see
unit-variance, zero-mean channels although pipelines know one scaling factor only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from emoji import load_emoji
from loop import Budget, Ema, Log, Optimisers, run, save
from torch import nn
from torch.nn import functional as F

import models

Pictures = torch.Tensor


def to_float(images: torch.Tensor) -> Pictures:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous(memory_format=torch.channels_last)


def augment(x: Pictures) -> Pictures:
    """Random mirror, channel order and shift by up to 3 px: the autoencoder need not know what is drawn."""
    if torch.rand(()) < 0.5:
        x = x.flip(3)
    if torch.rand(()) < 0.3:
        x = x[:, torch.randperm(3, device=x.device)]
    dy, dx = (int(v) for v in torch.randint(-3, 4, (2,)))
    return torch.roll(x, (dy, dx), (2, 3))


def edges(x: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Horizontal and vertical differences."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def loss_of(vae: nn.Module, x: Pictures, kl_weight: float) -> torch.Tensor:
    """Reconstruction, edge and KL terms."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample.float()
    (ax, ay), (bx, by) = edges(x), edges(y)
    reconstruction = F.l1_loss(y, x) + 2.0 * F.mse_loss(y, x) + 0.5 * (F.l1_loss(bx, ax) + F.l1_loss(by, ay))
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1.0 - posterior.logvar.float()).mean()
    return reconstruction + kl_weight * kl


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor, batch: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    """Posterior mean and standard deviation of uint8 images, float32, on the VAE's device."""
    parts = [vae.encode(to_float(chunk.to(vae.device))).latent_dist for chunk in images.split(batch)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor, batch: int = 128) -> float:
    """Mean over images of 10 log10(1 / MSE), pictures in [0, 1], through the posterior mean, rounded to 8 bits."""
    values = []
    for chunk in images.split(batch):
        x = to_float(chunk.to(vae.device))
        y = vae.decode(vae.encode(x).latent_dist.mean).sample
        y = (y / 2 + 0.5).clamp(0, 1).mul(255).round().div(255)
        values.append(-10 * torch.log10(((x / 2 + 0.5 - y) ** 2).mean((1, 2, 3)).clamp(min=1e-10)))
    return float(torch.cat(values).mean())


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Make every latent channel zero-mean and unit-variance by changing the two 1x1 convolutions."""
    mean, std = encode(vae, images)
    shift = mean.mean((0, 2, 3))
    scale = (mean.var((0, 2, 3)) + (std**2).mean((0, 2, 3))).sqrt()
    before, after = vae.quant_conv, vae.post_quant_conv
    channels = len(shift)
    after.bias += after.weight[:, :, 0, 0] @ shift
    after.weight *= scale[None, :, None, None]
    before.weight[:channels] /= scale[:, None, None, None]
    before.bias[:channels] = (before.bias[:channels] - shift) / scale
    before.bias[channels:] -= 2 * scale.log()
    mean, std = encode(vae, images)
    measured = (mean.var() + (std**2).mean()).sqrt()
    factor, offset = round(1 / float(measured), 5), round(float(mean.mean()), 5)
    vae.register_to_config(scaling_factor=factor, shift_factor=offset + 0.0)  # + 0.0: JSON should not say -0.0


def main() -> None:
    """Command line: see README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, help="folder for vae/, checkpoint and log")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-3)
    args = parser.parse_args()
    train(args)


def train(args: argparse.Namespace) -> None:
    """Train (resuming from ``vae.pt`` if there is one), fold, save ``vae/`` and ``vae.json``."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    emoji = load_emoji(args.data)
    pictures = emoji.images[~emoji.held_out].to(device)
    vae = models.make_vae(args.channels).to(device).to(memory_format=torch.channels_last)
    ema, optimiser = Ema(vae, 0.999), Optimisers(vae, args.lr)
    checkpoint, step = args.out / "vae.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        vae.load_state_dict(state["model"])
        ema.shadow, ema.updates, step = state["ema"], state["step"], state["step"]
        optimiser.load_state_dict(state["optimiser"])
    loss_fn = torch.compile(loss_of) if device == "cuda" else loss_of
    log = Log(args.out / "logs" / "vae.csv")

    def one(step: int, factor: float) -> None:
        x = augment(to_float(pictures[torch.randint(len(pictures), (args.batch,), device=device)]))
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_fn(vae, x.contiguous(memory_format=torch.channels_last), args.kl)
        loss.backward()
        optimiser.step(factor)
        ema.update()
        log.add(step, loss, factor, args.batch)

    def keep(step: int) -> None:
        save(checkpoint, model=vae.state_dict(), ema=ema.shadow, optimiser=optimiser.state_dict(), step=step)

    step = run(Budget(args.minutes, args.steps), step, one, keep)
    ema.copy_to(vae)
    finish(vae, emoji.images[emoji.held_out], pictures, step, args.out)


def finish(vae: AutoencoderKL, held_out: torch.Tensor, pictures: torch.Tensor, step: int, out: Path) -> None:
    """Fold statistics, measure, write the model."""
    vae = vae.to(memory_format=torch.contiguous_format)
    fold_statistics(vae, pictures)
    facts = {
        "psnr_held_out": psnr(vae, held_out),
        "psnr_seen": psnr(vae, pictures[:512]),
        "posterior_std": float(encode(vae, held_out)[1].mean()),
        "steps": step,
        "scaling_factor": vae.config.scaling_factor,
        "shift_factor": vae.config.shift_factor,
    }
    vae.save_pretrained(out / "vae")
    (out / "vae.json").write_text(json.dumps(facts, indent=1))
    print("vae", facts, flush=True)


if __name__ == "__main__":
    main()
