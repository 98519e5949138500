"""Converts files of weights from format to format, one weight at a time, exactly where the target can hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hasten.core.errors import HastenError, UnknownName
from hasten.core.files import atomic_write_text, ensure_writable
from hasten.formats.format import Entry, Format, Reader
from hasten.formats.journal import Journal
from hasten.formats.keys import NAMINGS, in_scheme
from hasten.formats.keys.naming import Renamed, recognize
from hasten.formats.opening import Opened, format_named, open_file
from hasten.formats.recoding import Recoding
from hasten.formats.registry import formats
from hasten.kernels.weight import QuantizedWeight

_GGUF_NAMES = {"stable_diffusion": "sd1", "z_image": "lumina2", "t5": "t5encoder"}
"""What `general.architecture` calls an architecture whose name is another here."""
_SUFFIX = {"gguf": ".gguf"}


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is to be converted into what."""

    source: Path
    target: Path
    format: str
    kind: str | None = None
    """What weights are coded as; None keeps what the target can hold, and codes the rest as its first kind."""
    keys: str | None = None
    """Naming of the weights in the target; None keeps the source's."""
    architecture: str = "auto"
    rotate: bool = False
    """Recode to 8-bit integers by row after a Hadamard rotation."""
    resume: bool = False
    """Go on with what an interrupted conversion has left."""


@dataclass
class Conversion:
    """What was done."""

    kept: int = 0
    """Weights that are exactly those of the source."""
    coded: int = 0
    """Plain weights that were put into codes."""
    recoded: int = 0
    """Weights in codes that were decoded and coded anew."""
    resumed: int = 0
    """Of these, how many an interrupted conversion had done."""
    left_out: int = 0
    """Weights of other networks in the file."""
    sha256: str = ""

    def count(self, anew: bool) -> None:
        """One more that was coded."""
        self.recoded += anew
        self.coded += not anew


class Progress(Protocol):
    """Is told what happens."""

    def start(self, weights: int) -> None:
        """So many weights are to come."""
        ...

    def advance(self, name: str) -> None:
        """A weight has been written."""
        ...


def convert(order: Order, progress: Progress) -> Conversion:
    """Convert a file; the target appears when it is complete, with its checksum in a file beside it.

    Memory holds one weight (or fused group) at a time. What had to be coded anew is kept beside the target until the
    end, so that an interrupted conversion can be resumed. Raises HastenError for what makes no sense.
    """
    layout = _checked(order)
    with open_file(order.source) as opened:
        reader = _named(opened.reader, order)
        journal = Journal.of(order.target, _fingerprint(order, opened), resume=order.resume)
        done = Conversion(left_out=len(opened.reader.names()) - _sources(opened.reader, reader))
        recoding = Recoding(layout, order.kind, order.rotate, already=_any_coded(reader))
        _write(reader, _Job(layout, order, recoding, journal, done), _metadata(opened, layout, reader), progress)
    done.sha256 = _sha256(order.target)
    atomic_write_text(checksum_file(order.target), f"{done.sha256}  {order.target.name}\n")
    journal.remove()
    return done


def checksum_file(path: Path) -> Path:
    """Where the SHA-256 of a file is, in the form that `sha256sum --check` reads."""
    return path.with_name(f"{path.name}.sha256")


@dataclass(frozen=True)
class _Job:
    layout: Format
    order: Order
    recoding: Recoding
    journal: Journal
    done: Conversion


def _checked(order: Order) -> Format:
    layout = format_named(order.format)
    if type(layout).create is Format.create:
        writable = [name for name, item in formats().items() if type(item).create is not Format.create]
        raise HastenError(f"hasten reads {layout.name}, and does not write it. It writes {', '.join(writable)}.")
    if order.kind is not None and order.kind not in layout.kinds:
        raise UnknownName(f"type of {layout.name}", order.kind, layout.kinds)
    if order.rotate and order.kind is not None:
        raise HastenError("--rotate codes weights as 8-bit integers, so that it goes without --type.")
    schemes = sorted({naming.scheme for naming in NAMINGS})
    if order.keys is not None and order.keys not in schemes:
        raise UnknownName("naming of weights", order.keys, schemes)
    _check_target(order, layout)
    return layout


def _check_target(order: Order, layout: Format) -> None:
    target, suffix = order.target, _SUFFIX.get(layout.name, ".safetensors")
    if target.suffix != suffix:
        raise HastenError(f"A file of format {layout.name} has a name like {target.with_suffix(suffix).name}.")
    if target.exists():
        raise HastenError(f"{target} is there already; remove it, or choose another name.")
    ensure_writable(target.parent)


def _named(reader: Reader, order: Order) -> Reader:
    return reader if order.keys is None else in_scheme(reader, order.keys, order.architecture)


def _sources(reader: Reader, renamed: Reader) -> int:
    """How many of a reader's entries another one, which renames them, takes."""
    return renamed.sources() if isinstance(renamed, Renamed) else len(reader.names())


def _any_coded(reader: Reader) -> bool:
    """Are weights of the file in codes already? Plain ones are but views, so that looking costs little."""
    matrices = (name for name in reader.names() if len(reader.shape(name)) > 1)
    return any(isinstance(reader.read(name).weight, QuantizedWeight) for name in matrices)


def _fingerprint(order: Order, opened: Opened) -> Mapping[str, Any]:
    """On what results depend: they can be taken over only if all of it is the same."""
    return {
        "source": order.source.name, "bytes": size_of(order.source), "changed": _changed(order.source),
        "weights": hashlib.sha256("\n".join(opened.reader.names()).encode()).hexdigest(),
        "format": order.format, "kind": order.kind, "keys": order.keys, "rotate": order.rotate,
    }  # fmt: skip


def size_of(path: Path) -> int:
    """Bytes of a file of weights, or of all that lie in a folder."""
    return sum(file.stat().st_size for file in _files(path))


def _changed(path: Path) -> int:
    return max((file.stat().st_mtime_ns for file in _files(path)), default=0)


def _files(path: Path) -> list[Path]:
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


def _metadata(opened: Opened, layout: Format, reader: Reader) -> dict[str, Any]:
    alike = (opened.format.name == "gguf") == (layout.name == "gguf")
    found = dict(opened.reader.metadata) if alike else {}
    if layout.name == "gguf" and (known := recognize(reader.names(), NAMINGS)) is not None:
        name = known.naming.architecture
        found.setdefault("general.architecture", _GGUF_NAMES.get(name, name))
    return found


def _write(reader: Reader, job: _Job, metadata: Mapping[str, Any], progress: Progress) -> None:
    names = reader.names()
    progress.start(len(names))
    writer = job.layout.create(job.order.target, names, metadata)
    try:
        for name in names:
            writer.add(name, _made(name, reader, job))
            progress.advance(name)
        writer.finish()
    except BaseException:
        writer.abandon()
        job.journal.leave()
        raise


def _made(name: str, reader: Reader, job: _Job) -> Entry:
    if (found := job.journal.find(name)) is not None and job.layout.accepts(found):
        job.done.resumed += 1
        job.done.count(job.journal.anew(name))
        return found
    entry = reader.read(name)
    made = job.recoding(name, entry)
    if made is entry:
        job.done.kept += 1
        return made
    anew = isinstance(entry.weight, QuantizedWeight)
    job.done.count(anew)
    if isinstance(made.weight, QuantizedWeight):
        job.journal.note(name, made, anew=anew)
    return made


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
