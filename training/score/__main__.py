"""Score samples of the bundled models; run inside `training/`, with score/requirements.txt installed.

    python -m score DATA --samples FOLDER --out score/results.json [--cache .cache/score]

DATA is what `emoji.py` writes. FOLDER holds a folder per model with `images.npz` and `captions.json`. Without
--samples only the scores themselves are checked, on real images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from emoji import load_emoji

from score.judge import Judge, load_samples
from score.validate import validate

HERE = Path(__file__).parent


def styles_of(model: str) -> tuple[str, ...] | None:
    """The styles a model was trained on, None for all."""
    if model != "emoji-dit":
        return None
    from tasks import DIT_STYLES

    return DIT_STYLES


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes under a temporary name and renames."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


def rounded(value: Any) -> Any:
    """Numbers with five significant digits, so that the file is readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--out", type=Path, default=HERE / "results.json")
    parser.add_argument("--cache", type=Path, default=HERE.parent / ".cache" / "score")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    emoji = load_emoji(options.data)
    judge = Judge(emoji, options.cache)
    data = {
        "images": len(emoji),
        "names": len(judge.names),
        "styles": judge.styles,
        "held_out": int(emoji.held_out.sum()),
    }
    results: dict[str, Any] = {"schema": 1, "data": data, "validation": validate(judge), "models": {}}
    print(json.dumps(rounded(results["validation"]), indent=1))
    for folder in sorted(options.samples.glob("*/")) if options.samples else []:
        results["models"][folder.name] = judge.score(load_samples(folder), styles_of(folder.name))
        print(folder.name, json.dumps(rounded(results["models"][folder.name]), indent=1))
    write_json(options.out, rounded(results))


if __name__ == "__main__":
    main()
