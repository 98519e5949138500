"""The section of RESULTS.md about loss against interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from bootstrap import estimate

from hasten.core.files import read_json


def pattern_section(out: Path) -> str:
    """A table for each pattern file; empty where there is none."""
    files = sorted((out / "results").glob("pattern-*.json"))
    tables = [table(cast("dict[str, Any]", read_json(file))) for file in files]
    if not tables:
        return ""
    return "\n".join(["## Loss against interval", "", *tables])


def table(content: dict[str, Any]) -> str:
    """One model."""
    lines = [f"{content['model']}, {content['steps']} steps, {content['prompts']} prompts:", ""]
    lines += ["| row | full steps | work | CPU s | PSNR to plain | LPIPS | PSNR to converged |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    for key, row in content["rows"].items():
        if row["status"] == "ok":
            lines.append(line(key, row))
    return "\n".join([*lines, ""])


def line(key: str, row: dict[str, Any]) -> str:
    """One row."""
    cells = [
        key,
        f"{row['full_steps']:.0f}",
        f"{100 * row['work']:.0f} %",
        f"{row['cpu_seconds']['median']:.2f}",
        "-" if key == "plain" else estimate(row["to_plain"]["psnr"]).text(1),
        "-" if key == "plain" else estimate(row["to_plain"]["lpips"]).text(3),
        estimate(row["to_converged"]["psnr"]).text(1),
    ]
    return "| " + " | ".join(cells) + " |"
