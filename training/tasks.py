"""One class per model: its trainable modules and its training loss over a batch of image indices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from captions import VARIANTS, all_variants
from diffusers import AutoencoderKL
from emoji import EmojiSet, load_emoji
from loop import matrices
from torch import nn
from torch.nn import functional as F
from train_vae import encode

import models

DROPOUT = 0.1
DIT_STYLES = ("noto", "twemoji", "fluent")


@dataclass
class Data:
    """Normalised latents (posterior mean and standard deviation) and tokenised captions, on the device."""

    mean: torch.Tensor
    std: torch.Tensor
    emoji: EmojiSet
    index: list[int]
    device: str
    posterior: float = 1.0  # share of the posterior's deviation in the latents

    def __len__(self) -> int:
        return len(self.index)

    def latents(self, batch: torch.Tensor) -> torch.Tensor:
        """A sample of the posterior of each image."""
        return self.mean[batch] + self.posterior * self.std[batch] * torch.randn_like(self.mean[batch])

    def tokens(self, tokenizer: Any, length: int) -> torch.Tensor:
        """Token ids [N + 1, VARIANTS, length] int64; the last row is the empty caption."""
        every = all_variants(self.emoji)
        wordings = [every[i] for i in self.index] + [[""] * VARIANTS]
        flat = [text for row in wordings for text in row]
        ids = tokenizer(flat, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
        return ids.view(len(wordings), VARIANTS, length).to(self.device)


def load_data(
    folder: Path, vae: AutoencoderKL, device: str, styles: tuple[str, ...] = (), names: set[str] | None = None
) -> Data:
    """Encode the training part (optionally only some styles and concepts)."""
    emoji = load_emoji(folder)
    held_out = emoji.held_out.tolist()
    index = [
        i
        for i in range(len(emoji))
        if not held_out[i] and (not styles or emoji.styles[i] in styles) and (names is None or emoji.names[i] in names)
    ]
    mean, std = encode(vae.to(device), emoji.images[index])
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    return Data((mean - shift) * scale, std * scale, emoji, index, device)


def drop(rows: torch.Tensor, null: int, probability: float = DROPOUT) -> torch.Tensor:
    """Replace a share of the indices by the null index."""
    return torch.where(torch.rand(rows.shape, device=rows.device) < probability, null, rows)


def pick(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A random wording per row."""
    return tokens[rows, torch.randint(tokens.shape[1], rows.shape, device=rows.device)]


def pack(z: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4 C], FLUX's order (channel, row, column inside a token)."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def image_ids(side: int, device: str) -> torch.Tensor:
    """Position ids [side * side, 3] of packed latents."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3).float().to(device)


class Task(nn.Module):
    """Trainable modules plus what the loop asks for; sub-classes fill `components` and `loss`."""

    muon_lr = 0.0
    lr = 1e-3
    data: Data

    def refine(self) -> None:
        """From now on care more about what shows as texture: latents without noise, more of the last steps."""
        self.data.posterior = 0.0

    def components(self) -> dict[str, nn.Module]:
        """Modules as they are named in the pipeline folder."""
        raise NotImplementedError

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean training loss of images with these indices."""
        raise NotImplementedError

    def muon(self) -> list[nn.Parameter]:
        """Matrices for Muon."""
        return []

    def compile(self) -> None:
        """Compile what runs most."""
        raise NotImplementedError


class FluxTask(Task):
    """Rectified flow; v = noise - data; logit-normal times shifted like the sampler's; text lengths 16 to 512."""

    lr, muon_lr = 1e-3, 2e-3
    lengths = (16, 32, 64, 128, 512)
    shares = (0.80, 0.10, 0.04, 0.03, 0.03)
    shift = 1.65  # e^0.5, what the scheduler does at 256 tokens
    even = 0.1  # share of the times that are spread evenly, as the sampler's are

    def __init__(self, data: Data, tokenizers: Path) -> None:
        super().__init__()
        self.data = data
        clip, t5 = models.load_tokenizer(tokenizers / "clip"), models.load_tokenizer(tokenizers / "t5")
        self.text_encoder = models.make_clip(len(clip), clip.bos_token_id, clip.eos_token_id, 64, 2)
        self.text_encoder_2 = models.make_t5(len(t5))
        self.transformer = models.make_flux(data.mean.shape[1], 96, 64)
        self.clip_ids, self.t5_ids = data.tokens(clip, 24), data.tokens(t5, 16)
        self.image_ids = image_ids(models.LATENT_SIZE // 2, data.device)
        self.fast: Any = self.transformer
        self.to(data.device)

    def components(self) -> dict[str, nn.Module]:
        return {
            "text_encoder": self.text_encoder,
            "text_encoder_2": self.text_encoder_2,
            "transformer": self.transformer,
        }

    def muon(self) -> list[nn.Parameter]:
        return matrices(self.transformer, "transformer_blocks.")

    def compile(self) -> None:
        self.fast = torch.compile(self.transformer, dynamic=False)

    def refine(self) -> None:
        super().refine()
        self.even = 0.6

    def length(self) -> int:
        """A text length for one batch."""
        return self.lengths[int(torch.multinomial(torch.tensor(self.shares), 1))]

    def texts(self, rows: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """T5 states [B, length, 96] and CLIP pooled vectors [B, 64] of one random wording per row."""
        wording = torch.randint(VARIANTS, rows.shape, device=rows.device)
        ids = F.pad(self.t5_ids[rows, wording], (0, length - self.t5_ids.shape[2]))
        return self.text_encoder_2(ids)[0], self.text_encoder(self.clip_ids[rows, wording]).pooler_output

    def times(self, count: int) -> torch.Tensor:
        """Times in (0, 1), 1 is pure noise."""
        t = torch.sigmoid(torch.randn(count, device=self.data.device))
        t = torch.where(torch.rand_like(t) < self.even, torch.rand_like(t), t)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, guidance: torch.Tensor, states: torch.Tensor, pooled: torch.Tensor
    ) -> Any:
        """The transformer exactly as FluxPipeline calls it."""
        net = self.fast if states.shape[1] == 16 else self.transformer
        text_ids = torch.zeros(states.shape[1], 3, device=x.device)
        return net(
            hidden_states=x, timestep=t, guidance=guidance, pooled_projections=pooled, encoder_hidden_states=states,
            txt_ids=text_ids, img_ids=self.image_ids, return_dict=False,
        )[0]  # fmt: skip

    def noised(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy packed latents, times and the velocity."""
        data = pack(self.data.latents(batch))
        noise, t = torch.randn_like(data), self.times(len(batch))
        x = (1 - t[:, None, None]) * data + t[:, None, None] * noise
        return x, t, noise - data

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        length = self.length()
        if length > 64:
            batch = batch[: len(batch) // 2]
        x, t, velocity = self.noised(batch)
        states, pooled = self.texts(drop(batch, len(self.data)), length)
        return F.mse_loss(self.predict(x, t, torch.ones_like(t), states, pooled).float(), velocity)


class DiffusionTask(Task):
    """v-prediction under the zero-terminal-SNR schedule with min-SNR-5 weights (arXiv 2303.09556)."""

    floor = 0.25  # added to every weight: what the nearly noiseless and the nearly pure noise get

    def __init__(self, data: Data) -> None:
        super().__init__()
        self.data = data
        self.alphas = models.ddim_scheduler().alphas_cumprod.to(data.device)

    def refine(self) -> None:
        super().refine()
        self.floor = 0.6

    def noised(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, integer times, target velocity and loss weight."""
        data = self.data.latents(batch)
        noise = torch.randn_like(data)
        t = torch.randint(len(self.alphas), batch.shape, device=batch.device)
        a = self.alphas[t][:, None, None, None]
        snr = a / (1 - a)
        weight = self.floor + snr.clamp(max=5.0) / (snr + 1)
        return a.sqrt() * data + (1 - a).sqrt() * noise, t, a.sqrt() * noise - (1 - a).sqrt() * data, weight


class UNetTask(DiffusionTask):
    """Stable-Diffusion-type: CLIP states of all 77 tokens through cross-attention."""

    lr = 1.5e-3

    def __init__(self, data: Data, tokenizers: Path) -> None:
        super().__init__(data)
        clip = models.load_tokenizer(tokenizers / "clip")
        self.text_encoder = models.make_clip(len(clip), clip.bos_token_id, clip.eos_token_id, 96, 2)
        self.unet = models.make_unet(data.mean.shape[1], 96)
        self.ids = data.tokens(clip, 77)
        self.fast: Any = self.unet
        self.to(data.device)
        self.unet.to(memory_format=torch.channels_last)

    def components(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.text_encoder, "unet": self.unet}

    def compile(self) -> None:
        self.fast = torch.compile(self.unet, dynamic=False)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        x, t, velocity, weight = self.noised(batch)
        states = self.text_encoder(pick(self.ids, drop(batch, len(self.data))))[0]
        x = x.contiguous(memory_format=torch.channels_last)
        return (weight * (self.fast(x, t, states, return_dict=False)[0].float() - velocity) ** 2).mean()


class DiTTask(DiffusionTask):
    """Class-conditional: the class is the concept, the three styles are mixed."""

    lr, muon_lr = 1e-3, 2e-3

    def __init__(self, data: Data) -> None:
        super().__init__(data)
        names = [data.emoji.names[i] for i in data.index]
        self.names = sorted(set(names))
        self.classes = torch.tensor([self.names.index(name) for name in names], device=data.device)
        self.transformer = models.make_dit(data.mean.shape[1])
        for block in self.transformer.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0  # done here, once for all blocks, not in each on its own
        self.fast: Any = self.transformer
        self.to(data.device)

    def components(self) -> dict[str, nn.Module]:
        return {"transformer": self.transformer}

    def muon(self) -> list[nn.Parameter]:
        return matrices(self.transformer, "transformer_blocks.")

    def compile(self) -> None:
        self.fast = torch.compile(self.transformer, dynamic=False)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        x, t, velocity, weight = self.noised(batch)
        labels = drop(self.classes[batch], models.NULL_CLASS)
        prediction = self.fast(x, timestep=t, class_labels=labels, return_dict=False)[0].float()
        return (weight * (prediction - velocity) ** 2).mean()


def dit_names(emoji: EmojiSet) -> set[str]:
    """Concepts that all six styles draw, people left out."""
    count: dict[str, int] = {}
    for name, group in zip(emoji.names, emoji.groups, strict=True):
        if group != "People & Body":
            count[name] = count.get(name, 0) + 1
    return {name for name, styles in count.items() if styles == 6}


def make_task(name: str, data: Path, vae: Path, tokenizers: Path, device: str) -> Task:
    """The task of a model name."""
    autoencoder = AutoencoderKL.from_pretrained(vae)
    if name == "emoji-dit":
        return DiTTask(load_data(data, autoencoder, device, DIT_STYLES, dit_names(load_emoji(data))))
    loaded = load_data(data, autoencoder, device)
    return FluxTask(loaded, tokenizers) if name == "emoji-flux" else UNetTask(loaded, tokenizers)
