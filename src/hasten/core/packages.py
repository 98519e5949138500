"""What hasten needs and what it can use: packages by name, the oldest usable version, and what each is for."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from hasten.core.diagnosis import Finding, in_words
from hasten.core.trying import in_another_process, report

KIND = "package"


@dataclass(frozen=True)
class Needed:
    """A package that hasten imports somewhere."""

    distribution: str
    least: str
    purpose: str
    module: str = ""
    """The name it is imported by, where that differs."""
    optional: bool = True

    @property
    def import_name(self) -> str:
        """The name it is imported by."""
        return self.module or self.distribution


PACKAGES = {
    entry.distribution: entry
    for entry in (
        Needed("torch", "2.9", "everything", optional=False),
        Needed("diffusers", "0.42", "the pipelines", optional=False),
        Needed("transformers", "5.0", "text encoders", optional=False),
        Needed("accelerate", "1.10", "loading and placing weights", optional=False),
        Needed("safetensors", "0.6", "reading weights", optional=False),
        Needed("numpy", "2.0", "numbers", optional=False),
        Needed("pillow", "11", "pictures", "PIL", optional=False),
        Needed("pydantic", "2.10", "reading and checking files", optional=False),
        Needed("torchmetrics", "1.6", "fidelity", optional=False),
        Needed("jinja2", "3.1", "the report", optional=False),
        Needed("rich", "14", "tables and progress", optional=False),
        Needed("typer", "0.16", "the command line", optional=False),
        Needed("psutil", "6", "memory figures", optional=False),
        Needed("peft", "0.17", "LoRA adapters"),
        Needed("pandas", "2.2", "results as a data frame"),
        Needed("triton", "3.2", "compiling for a GPU"),
    )
}


def diagnose(device: torch.device) -> Iterator[Finding]:
    """Import each package in another process, and try the compiler for a device."""
    yield from in_another_process("hasten.core.packages", KIND, [*PACKAGES, "torch.compile"], str(device))


def examine(name: str, device: torch.device) -> Finding:
    """Look at one package, or run something that torch.compile has compiled."""
    if name == "torch.compile":
        return _compiler(device)
    entry = PACKAGES[name]
    found = installed(name)
    if not found:
        return _finding(entry, "missing", f"{entry.purpose}: pip install '{name}>={entry.least}'")
    if numbers(found) < numbers(entry.least):
        return _finding(entry, "too old", f"{found}; needed is {entry.least}: pip install -U '{name}>={entry.least}'")
    try:
        importlib.import_module(entry.import_name)
    except Exception as error:  # noqa: BLE001 - an import may raise anything
        return _finding(entry, "broken", f"{found} cannot be imported: {in_words(error)}")
    return _finding(entry, "usable", f"{found}, for {entry.purpose}")


def _finding(entry: Needed, status: str, detail: str) -> Finding:
    kind = "optional package" if entry.optional else KIND
    return Finding(kind=kind, name=entry.distribution, status=status, detail=detail)  # pyright: ignore[reportArgumentType]


def installed(distribution: str) -> str:
    """The version of an installed distribution, or an empty text."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def numbers(text: str) -> tuple[int, ...]:
    """A version for comparison: its first three numbers, without what follows a plus."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0])[:3])


def _compiler(device: torch.device) -> Finding:
    given = torch.linspace(-1, 1, 64, device=device)
    found = torch.compile(torch.nn.functional.gelu)(given)
    error = float((found - torch.nn.functional.gelu(given)).abs().max())
    if not error < 1e-5:
        return Finding(
            kind="compiler", name="torch.compile", status="broken", detail=f"its result is off by {error:.2g}"
        )
    return Finding(kind="compiler", name="torch.compile", status="usable", detail=f"inductor compiles for {device}")


if __name__ == "__main__":
    place = torch.device(sys.argv[1])
    report(KIND, sys.argv[2:], lambda name: examine(name, place))
