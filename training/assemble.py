"""Write one complete diffusers folder (fp16 safetensors) from the EMA weights of a training run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, FluxPipeline, StableDiffusionPipeline

import models
from emoji import load_emoji
from tasks import DIT_STYLES, dit_names

STEPS = 28
GUIDANCE = {"emoji-flux": 3.0, "emoji-sd": 4.0, "emoji-dit": 3.0}
PROMPTS = [
    "pizza, fluent style",
    "rocket, noto style",
    "red apple, twemoji style",
    "octopus, flat style",
    "hamburger, emojione style",
    "ghost, blob style",
    "sunflower, noto style",
    "tiger face, fluent style",
]
CLASSES = ["pizza", "rocket", "red apple", "octopus", "hamburger", "ghost", "sunflower", "tiger face"]


def half(module: Any) -> Any:
    """The module in float16, evaluation mode."""
    return module.half().eval()


def load_parts(parts: dict[str, Any], ema: dict[str, torch.Tensor]) -> None:
    """Fill modules from ``<component>.<parameter>`` entries; every parameter must be there."""
    for component, module in parts.items():
        prefix = component + "."
        state = {key[len(prefix) :]: value for key, value in ema.items() if key.startswith(prefix)}
        missing = {name for name, _ in module.named_parameters()} - set(state)
        if missing:
            raise KeyError(f"{component}: no weights for {sorted(missing)[:3]}")
        module.load_state_dict(state, strict=False)


def pipeline(name: str, vae: AutoencoderKL, tokenizers: Path, ema: dict[str, torch.Tensor] | None) -> Any:
    """The pipeline of a model; without `ema` its weights are random (for drafts)."""
    channels = vae.config.latent_channels
    if name == "emoji-dit":
        transformer = models.make_dit(channels)
        parts = {"transformer": transformer}
        build = lambda: DiTPipeline(transformer=half(transformer), vae=half(vae), scheduler=models.ddim_scheduler())  # noqa: E731
        return _filled(parts, ema, build)
    clip = models.load_tokenizer(tokenizers / "clip")
    if name == "emoji-sd":
        encoder, unet = models.make_clip(len(clip), clip.bos_token_id, clip.eos_token_id, 96, 2), models.make_unet(channels, 96)
        build = lambda: StableDiffusionPipeline(  # noqa: E731
            vae=half(vae), text_encoder=half(encoder), tokenizer=clip, unet=half(unet), scheduler=models.ddim_scheduler(),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        return _filled({"text_encoder": encoder, "unet": unet}, ema, build)
    t5 = models.load_tokenizer(tokenizers / "t5")
    encoder, encoder_2 = models.make_clip(len(clip), clip.bos_token_id, clip.eos_token_id, 64, 2), models.make_t5(len(t5))
    transformer = models.make_flux(channels, 96, 64)
    build = lambda: FluxPipeline(  # noqa: E731
        scheduler=models.flow_scheduler(), vae=half(vae), text_encoder=half(encoder), tokenizer=clip,
        text_encoder_2=half(encoder_2), tokenizer_2=t5, transformer=half(transformer),
    )  # fmt: skip
    return _filled({"text_encoder": encoder, "text_encoder_2": encoder_2, "transformer": transformer}, ema, build)


def _filled(parts: dict[str, Any], ema: dict[str, torch.Tensor] | None, build: Any) -> Any:
    if ema is not None:
        load_parts(parts, ema)
    return build()


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | changes, indent=2) + "\n")


def write(name: str, pipe: Any, folder: Path, data: Path) -> None:
    """Save, then repair by hand what `save_pretrained` leaves out or writes differently."""
    pipe.save_pretrained(folder, safe_serialization=True)
    for encoder in ("text_encoder", "text_encoder_2"):
        if (folder / encoder / "config.json").exists():
            # transformers would otherwise load half precision beside a float32 rest
            edit_json(folder / encoder / "config.json", dtype="float32")
    if name == "emoji-dit":
        emoji = load_emoji(data)
        labels = {str(i): label for i, label in enumerate(sorted(dit_names(emoji)))}
        edit_json(folder / "model_index.json", id2label=labels)
    workload = {
        "width": 128,
        "height": 128,
        "steps": STEPS,
        "guidance": GUIDANCE[name],
        "max_sequence_length": 16 if name == "emoji-flux" else None,
        "prompts": CLASSES if name == "emoji-dit" else PROMPTS,
    }
    (folder / "workload.json").write_text(json.dumps(workload, indent=2) + "\n")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{name}: {size:,} bytes -> {folder} (styles for emoji-dit: {', '.join(DIT_STYLES)})")


def main() -> None:
    """Command line: see README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path, help="folder with vae/ and <model>.ema.pt")
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.run / "vae") if (args.run / "vae").exists() else models.make_vae()
    stem = args.model + ("-distilled" if args.model == "emoji-flux" else "")
    checkpoint = args.run / f"{stem}.ema.pt"
    ema = torch.load(checkpoint, map_location="cpu", weights_only=True)["ema"] if checkpoint.exists() else None
    write(args.model, pipeline(args.model, vae, args.tokenizers, ema), args.folder, args.data)


if __name__ == "__main__":
    main()
