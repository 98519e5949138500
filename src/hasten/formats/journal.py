"""What an interrupted conversion has done, kept beside its target so that it need not be done again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from hasten.core.errors import HastenError
from hasten.core.files import ensure_folder
from hasten.formats.format import Entry, Reader
from hasten.formats.opening import format_named

_LIST = "journal.jsonl"
_VERSION = 1


@dataclass(frozen=True)
class _Part:
    """A weight that has been coded."""

    file: str
    sha256: str
    anew: bool
    """Was it in codes before?"""


class Journal:
    """Weights that were coded, each in a file of hasten's layout with its checksum, and a list of them."""

    def __init__(self, folder: Path, known: Mapping[str, _Part]) -> None:
        self.folder, self._known = folder, dict(known)
        self._open: Reader | None = None

    @classmethod
    def of(cls, target: Path, facts: Mapping[str, Any], *, resume: bool) -> Journal:
        """The journal of a target. Without `resume` it begins anew.

        Raises HastenError if it is to be resumed and there is none, or one of another conversion.
        """
        folder = target.with_name(f".{target.name[:80]}.parts")
        if resume:
            return cls(folder, _read(folder / _LIST, facts, target))
        shutil.rmtree(folder, ignore_errors=True)
        ensure_folder(folder)
        _append(folder / _LIST, {"version": _VERSION, **facts})
        return cls(folder, {})

    def find(self, name: str) -> Entry | None:
        """The weight as it was coded; None if it was not, or if its file has been damaged since.

        It is valid until the next is looked for.
        """
        self._close()
        part = self._known.get(name)
        path = self.folder / part.file if part else None
        if part is None or path is None or not path.is_file() or _sha256(path) != part.sha256:
            return None
        self._open = format_named("hasten").open(path)
        return self._open.read(name)

    def anew(self, name: str) -> bool:
        """Was a weight that `find` finds in codes before?"""
        return self._known[name].anew

    def note(self, name: str, entry: Entry, *, anew: bool) -> None:
        """Keep a weight that has been coded."""
        file = f"{len(self._known):06d}.safetensors"
        path = self.folder / file
        path.unlink(missing_ok=True)
        writer = format_named("hasten").create(path, [name], {})
        try:
            writer.add(name, entry)
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
        part = self._known[name] = _Part(file, _sha256(path), anew)
        _append(self.folder / _LIST, {"name": name, **asdict(part)})

    def leave(self) -> bool:
        """Keep what there is for another time; False if there is nothing, of which nothing is left."""
        if not self._known:
            self.remove()
        return bool(self._known)

    def remove(self) -> None:
        """Remove all of it."""
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def _read(file: Path, facts: Mapping[str, Any], target: Path) -> dict[str, _Part]:
    if not file.is_file():
        raise HastenError(f"There is no interrupted conversion to {target} that could be resumed.")
    lines = [_object(line) for line in file.read_text("utf-8").splitlines()]
    first = lines[0] if lines else {}
    for key, value in {"version": _VERSION, **facts}.items():
        if first.get(key) != value:
            raise HastenError(
                f"The interrupted conversion to {target} had {key} {first.get(key)!r}, and this one has {value!r}; "
                "leave --resume out to begin anew."
            )
    found = (line for line in lines[1:] if {"name", "file", "sha256", "anew"} <= line.keys())
    return {
        str(line["name"]): _Part(Path(str(line["file"])).name, str(line["sha256"]), bool(line["anew"]))
        for line in found
    }


def _object(line: str) -> dict[str, Any]:
    """A line of the list; nothing for one that was cut off."""
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _append(file: Path, line: Mapping[str, Any]) -> None:
    try:
        with file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise HastenError(f"Cannot write {file}: {(error.strerror or str(error)).lower()}.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
