"""Tries things in another process, so that one that crashes or hangs is a finding and no end of everything."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import hasten
from hasten.core.diagnosis import Finding, in_words

_MARK = "hasten finding: "
"""Begins the lines that are meant for us; what is tried may print as well."""


def in_another_process(
    module: str, kind: str, names: Iterable[str], *arguments: str, seconds: float = 300.0
) -> Iterator[Finding]:
    """Run `python -m module arguments... names...`, which answers through `report`, and yield its findings.

    Whoever ends the process, or keeps it for longer than `seconds`, is named as broken; the rest is tried in a new one.
    """
    left = list(names)
    while left:
        findings, ending = _run([module, *arguments, *left], seconds)
        yield from findings
        seen = {finding.name for finding in findings}
        left = [name for name in left if name not in seen]
        if left:
            culprit, *left = left
            yield Finding(kind=kind, name=culprit, status="broken", detail=f"trying it {ending}")


def report(kind: str, names: Iterable[str], examine: Callable[[str], Finding]) -> None:
    """In the other process: examine one after the other and print what is found; an error is a finding as well."""
    for name in names:
        try:
            found = examine(name)
        except BaseException as error:  # noqa: BLE001 - whatever is tried may raise anything, exits included
            found = Finding(kind=kind, name=name, status="broken", detail=in_words(error))
        print(f"\n{_MARK}{json.dumps(asdict(found))}", flush=True)


def _run(command: list[str], seconds: float) -> tuple[list[Finding], str]:
    try:
        done = subprocess.run(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-m", *command], capture_output=True, timeout=seconds, env=_environment(), check=False
        )
        printed, said, ending = done.stdout, done.stderr, _ending(done.returncode)
    except subprocess.TimeoutExpired as late:
        printed, said, ending = late.stdout or b"", b"", f"took longer than {seconds:g} s"
    lines = printed.decode(errors="replace").splitlines()
    found = [Finding(**json.loads(line.removeprefix(_MARK))) for line in lines if line.startswith(_MARK)]
    last = said.decode(errors="replace").strip().rpartition("\n")[2]
    return found, f"{ending}: {last}" if last else ending


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended the process with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = str(-code)
    return f"ended the process with signal {name}"


def _environment() -> dict[str, str]:
    """Our own sources first, wherever this process found them."""
    source = str(Path(hasten.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([source, *filter(None, sys.path)])}
