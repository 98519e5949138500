"""Write one complete diffusers folder (fp16 safetensors) from the EMA weights of a training run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, FluxPipeline, StableDiffusionPipeline
from emoji import load_emoji
from tasks import dit_names

import models

Weights = dict[str, torch.Tensor]
STEPS = 28
GUIDANCE = {"emoji-flux": 3.0, "emoji-sd": 2.0, "emoji-dit": 3.0}
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


def load_parts(parts: dict[str, Any], ema: Weights) -> None:
    """Fill modules from ``<component>.<parameter>`` entries; every parameter must be there."""
    for component, module in parts.items():
        prefix = component + "."
        state = {key[len(prefix) :]: value for key, value in ema.items() if key.startswith(prefix)}
        missing = {name for name, _ in module.named_parameters()} - set(state)
        if missing:
            raise KeyError(f"{component}: no weights for {sorted(missing)[:3]}")
        module.load_state_dict(state, strict=False)


def text_parts(tokenizers: Path, width: int) -> tuple[Any, Any]:
    """The CLIP tokenizer and a text encoder of this width."""
    clip = models.load_tokenizer(tokenizers / "clip")
    return clip, models.make_clip(len(clip), clip.bos_token_id, clip.eos_token_id, width, 2)


def flux_pipeline(vae: AutoencoderKL, tokenizers: Path, ema: Weights) -> FluxPipeline:
    """FLUX with both text encoders."""
    clip, encoder = text_parts(tokenizers, 64)
    t5 = models.load_tokenizer(tokenizers / "t5")
    encoder_2, transformer = models.make_t5(len(t5)), models.make_flux(vae.config.latent_channels, 96, 64)
    load_parts({"text_encoder": encoder, "text_encoder_2": encoder_2, "transformer": transformer}, ema)
    return FluxPipeline(
        scheduler=models.flow_scheduler(),
        vae=half(vae),
        text_encoder=half(encoder),
        tokenizer=clip,
        text_encoder_2=half(encoder_2),
        tokenizer_2=t5,
        transformer=half(transformer),
    )


def sd_pipeline(vae: AutoencoderKL, tokenizers: Path, ema: Weights) -> StableDiffusionPipeline:
    """Stable Diffusion without a safety checker (the training set is emoji)."""
    clip, encoder = text_parts(tokenizers, 96)
    unet = models.make_unet(vae.config.latent_channels, 96)
    load_parts({"text_encoder": encoder, "unet": unet}, ema)
    return StableDiffusionPipeline(
        vae=half(vae),
        text_encoder=half(encoder),
        tokenizer=clip,
        unet=half(unet),
        scheduler=models.ddim_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def dit_pipeline(vae: AutoencoderKL, tokenizers: Path, ema: Weights) -> DiTPipeline:
    """DiT; its labels are added by `write`, because `save_pretrained` drops them."""
    transformer = models.make_dit(vae.config.latent_channels)
    load_parts({"transformer": transformer}, ema)
    return DiTPipeline(transformer=half(transformer), vae=half(vae), scheduler=models.ddim_scheduler())


PIPELINES = {"emoji-flux": flux_pipeline, "emoji-sd": sd_pipeline, "emoji-dit": dit_pipeline}


def edit_json(path: Path, **changes: Any) -> None:
    """Change top-level keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(
        json.dumps({k: v for k, v in content.items() if k not in changes or v is not None}, indent=2) + "\n"
    )


def write(name: str, pipe: Any, folder: Path, data: Path) -> None:
    """Save, then repair by hand what `save_pretrained` leaves out or writes differently."""
    pipe.save_pretrained(folder, safe_serialization=True)
    for encoder in ("text_encoder", "text_encoder_2"):
        if (folder / encoder / "config.json").exists():
            # transformers would otherwise load half precision beside a float32 rest
            edit_json(folder / encoder / "config.json", dtype="float32")
    edit_json(folder / "vae" / "config.json", _name_or_path=None)
    for tokenizer in folder.glob("tokenizer*"):
        edit_json(tokenizer / "tokenizer_config.json", is_local=None, local_files_only=None)
    if name == "emoji-flux":
        # the name that transformers 4 and 5 both know
        edit_json(folder / "tokenizer_2" / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
        edit_json(folder / "model_index.json", tokenizer_2=["transformers", "PreTrainedTokenizerFast"])
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
    for tokenizer in folder.glob("tokenizer*/tokenizer.json"):
        tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), ensure_ascii=False, separators=(",", ":")))
    share_autoencoder(folder / "vae" / "diffusion_pytorch_model.safetensors")
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{name}: {size:,} bytes -> {folder}")


def share_autoencoder(file: Path) -> None:
    """The three models have the same autoencoder; that of emoji-flux is kept, and the others are links to it."""
    target = Path("..", "..", "emoji-flux", "vae", file.name)
    original = file.parent / target
    if original.is_file() and not original.samefile(file) and original.read_bytes() == file.read_bytes():
        file.unlink()
        file.symlink_to(target)


def main() -> None:
    """Command line: see README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=list(PIPELINES))
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path, help="folder with vae/ and <model>.ema.pt")
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.run / "vae")
    stem = args.model + ("-distilled" if args.model == "emoji-flux" else "")
    ema = torch.load(args.run / f"{stem}.ema.pt", map_location="cpu", weights_only=True)["ema"]
    write(args.model, PIPELINES[args.model](vae, args.tokenizers, ema), args.folder, args.data)


if __name__ == "__main__":
    main()
