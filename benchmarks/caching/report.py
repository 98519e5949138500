"""Turns the raw results into RESULTS.md and plots/*.webp; needs matplotlib (benchmarks/requirements-peers.txt).

PYTHONPATH=.peers python benchmarks/caching/report.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from bootstrap import difference, estimate
from pattern_report import pattern_section

from hasten.core.files import atomic_write_text, read_json

HERE = Path(__file__).parent
FRACTIONS = (2, 3, 4, 5)
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """The rows of one model and step count, and what times.py found for them on idle machines, by kind of device."""

    content: dict[str, Any]
    times: dict[str, dict[str, Any]]

    @property
    def title(self) -> str:
        """Model and steps."""
        return f"{self.content['model']}, {self.content['steps']} steps"

    @property
    def slug(self) -> str:
        """Name for files."""
        return f"{self.content['model']}-{self.content['steps']}"

    @property
    def plain(self) -> Row:
        """The uncached row."""
        return self.content["rows"]["plain"]

    def at(self, fraction: int) -> list[Row]:
        """The rows of one budget, as run."""
        rows = self.content["rows"].items()
        return [row for key, row in rows if key.endswith(f"@ 1/{fraction}")]

    def best_solver(self, fraction: int) -> Row | None:
        """Of the rows "fewer steps" the one nearest to the plain pictures: chosen on these prompts, in its favour."""
        found = [row for row in self.at(fraction) if row["kind"] == "baseline" and row["status"] == "ok"]
        return max(found, key=lambda row: estimate(row["to_plain"]["psnr"]).mean, default=None)


def load_tables(folder: Path) -> list[Table]:
    """All results that have a plain row, models and steps in order."""
    order = {"emoji-flux": 0, "emoji-sd": 1, "emoji-dit": 2}
    tables = [
        Table(cast("dict[str, Any]", read_json(path)), times_beside(path))
        for path in folder.glob("emoji-*-[0-9]*.json")
    ]
    ready = [table for table in tables if "plain" in table.content["rows"]]
    return sorted(ready, key=lambda table: (order.get(table.content["model"], 9), table.content["steps"]))


def times_beside(path: Path) -> dict[str, dict[str, Any]]:
    """The files of times.py that belong to a results file, by "cpu" and "cuda"; none if they are of other weights."""
    found = {file.stem.rpartition("-")[2]: file for file in (path.parent / "times").glob(f"{path.stem}-*.json")}
    contents = {kind: cast("dict[str, Any]", read_json(file)) for kind, file in found.items()}
    weights = cast("dict[str, Any]", read_json(path))["weights"]
    return {kind: content for kind, content in contents.items() if content["weights"] == weights}


HEADER = (
    "| row | full / partly / left out | work | processor s | CPU s | GPU s "
    "| PSNR to plain | vs best solver | SSIM | LPIPS | PSNR to converged | alignment |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def section(table: Table) -> str:
    """One model and step count as Markdown."""
    plain = table.plain
    lines = [f"## {table.title}", ""]
    lines += [f"![{table.title}](plots/{table.slug}.webp)", ""]
    lines += [
        f"Plain: {plain['cpu_seconds']['median']:.2f} s of processor time a picture, PSNR to the converged sampler "
        f"{estimate(plain['to_converged']['psnr']).text(1)} dB. {table.content['prompts']} prompts.",
        "",
    ]
    for fraction in FRACTIONS:
        lines += [f"### 1/{fraction}: {table.content['steps'] // fraction} full steps", "", HEADER]
        best = table.best_solver(fraction)
        lines += [line(row, best, table) for row in table.at(fraction) if row["status"] == "ok"]
        lines += [""]
    return "\n".join([*lines, failures(table)])


def line(row: Row, best: Row | None, table: Table) -> str:
    """One row of a table."""
    psnr = row["to_plain"]["psnr"]
    steps = " / ".join(f"{row[name]:.1f}" for name in ("full_steps", "partial_steps", "left_out_steps"))
    processor = row["cpu_seconds"]
    versus = "-" if best is None or best is row else signed(difference(psnr, best["to_plain"]["psnr"]).text(1))
    name = row["name"] + (" †" if "machine" in row else "")
    cells = [
        f"**{name}**" if best is row else name,
        steps,
        f"{100 * row['work']:.0f} %",
        f"{processor['median']:.2f} ({processor['plain_meanwhile'] / processor['median']:.1f}x)",
        *(clocked(row, table, kind) for kind in ("cpu", "cuda")),
        estimate(psnr).text(1),
        versus,
        f"{estimate(row['to_plain']['ssim']).mean:.3f}",
        estimate(row["to_plain"]["lpips"]).text(3),
        estimate(row["to_converged"]["psnr"]).text(1),
        aligned(row, table.plain),
    ]
    return "| " + " | ".join(cells) + " |"


def clocked(row: Row, table: Table, kind: str) -> str:
    """Wall-clock seconds and the speed-up over plain pictures made around the row: of times.py, else of run.py."""
    rows = table.times.get(kind, {}).get("rows", {})
    key = next(key for key, other in table.content["rows"].items() if other is row)
    found = rows.get(key, {})
    if kind == "cpu" and not rows:
        found = {"seconds": row["seconds"]["median"], "plain": row["seconds"]["plain_meanwhile"]}
    return f"{found['seconds']:.2f} ({found['plain'] / found['seconds']:.1f}x)" if "seconds" in found else "-"


def aligned(row: Row, plain: Row) -> str:
    """Change of the log-probability of the right name against the plain pictures, prompt by prompt."""
    if "alignment" not in row or "alignment" not in plain:
        return "-"
    return signed(difference(row["alignment"], plain["alignment"]).text(2))


def signed(text: str) -> str:
    """With a plus sign where it is not negative."""
    return text if text.startswith("-") else f"+{text}"


def failures(table: Table) -> str:
    """Rows without a result and why, one line for equal reasons."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for key, row in table.content["rows"].items():
        if row["status"] != "ok":
            reasons.setdefault((row["name"], row["reason"]), []).append(key.rpartition("@ ")[2])
    if not reasons:
        return ""
    lines = [f"- {name} ({', '.join(where)}): {reason}" for (name, reason), where in reasons.items()]
    return "\n".join(["Did not run:", "", *lines, ""])


def preface(tables: list[Table]) -> str:
    """What the tables say and on which machine."""
    facts = tables[0].content["environment"]
    text = (HERE / "preface.md").read_text("utf-8")
    machine = ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    return f"{text.strip()}\n\nMeasured with: {machine}.\n"


def summary(tables: list[Table]) -> str:
    """Per model and budget the best row of each kind, by PSNR to the plain pictures."""
    lines = ["## In short: PSNR to the plain pictures in dB, best row of each kind", ""]
    lines += ["| | 1/2 | 1/3 | 1/4 | 1/5 |", "| --- | --- | --- | --- | --- |"]
    for table in tables:
        for kind, word in (("baseline", "fewer steps"), ("peer", "peers"), ("ours", "hasten")):
            cells = [best_cell(table, fraction, kind) for fraction in FRACTIONS]
            lines.append(f"| {table.title}: {word} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def best_cell(table: Table, fraction: int, kind: str) -> str:
    """PSNR and name of the best row of a kind, chosen on these very prompts."""
    rows = [row for row in table.at(fraction) if row["kind"] == kind and row["status"] == "ok"]
    near = [row for row in rows if row["full_steps"] <= table.content["steps"] // fraction + 0.51]
    if not near:
        return "-"
    best = max(near, key=lambda row: estimate(row["to_plain"]["psnr"]).mean)
    return f"{estimate(best['to_plain']['psnr']).text(1)} ({best['name'].removeprefix('fewer steps, ')})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    tables = load_tables(options.out / "results")
    if not tables:
        raise SystemExit(f"There are no results in {options.out / 'results'}; run run.py first.")
    parts = [preface(tables), summary(tables), pattern_section(options.out), *map(section, tables)]
    atomic_write_text(options.out / "RESULTS.md", "\n".join(parts).rstrip() + "\n")
    from plots import draw_all

    draw_all(tables, options.out / "plots")


if __name__ == "__main__":
    main()
