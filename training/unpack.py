"""Turn a bundled model back into what a training run resumes from, so that training can go on with it.

    python training/unpack.py src/hasten/models/emoji-sd RUN TOKENIZERS --step 7550

Writes RUN/<model>.ema.pt, RUN/vae and the tokenizers. For emoji-flux it is the distilled model, which at guidance 1
predicts what the undistilled one predicts for a caption.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from loop import save

PARTS = ("text_encoder", "text_encoder_2", "transformer", "unet")
TOKENIZERS = {"tokenizer": "clip", "tokenizer_2": "t5"}


def weights(pipe: Any) -> dict[str, torch.Tensor]:
    """Entries ``<component>.<parameter>``, in half precision as they ship."""
    found: dict[str, torch.Tensor] = {}
    for part in PARTS:
        module = getattr(pipe, part, None)
        if module is not None:
            found |= {f"{part}.{name}": value.detach().half() for name, value in module.named_parameters()}
    return found


def main() -> None:
    """Command line: see above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model folder")
    parser.add_argument("run", type=Path)
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("--step", type=int, default=0, help="the step that its log ended with")
    args = parser.parse_args()
    found = weights(DiffusionPipeline.from_pretrained(args.folder))
    save(args.run / f"{args.folder.name}.ema.pt", ema=found, step=args.step)
    shutil.copytree(args.folder / "vae", args.run / "vae", dirs_exist_ok=True)
    for name, kind in TOKENIZERS.items():
        if (args.folder / name).exists():
            shutil.copytree(args.folder / name, args.tokenizers / kind, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
