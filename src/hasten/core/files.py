"""Files written completely or not at all (under a temporary name, then renamed), and strict JSON."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import NoReturn, cast

from hasten.core.errors import HastenError

_WIDTH = 160
_MANY = 20  # entries of a list from which spaces between them are left out


def atomic_write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` as UTF-8 like `atomic_write_bytes`; lone surrogates are written as `\\udcff`."""
    return atomic_write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write `data` to `path`, which holds the old or the new content at any time; return the path.

    Missing parent folders are created. Raises HastenError when the folder or the file cannot be written.
    """
    target = Path(path)
    ensure_folder(target.parent)
    temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(4)}.tmp")
    try:
        if target.is_dir():
            raise HastenError(f"Cannot write the file {target}: a folder of that name is there.")
        _write_through(temporary, data)
        temporary.replace(target)
    except OSError as error:
        raise HastenError(f"Cannot write {target.name} into {target.parent}: {_reason(error)}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target


def ensure_folder(folder: str | os.PathLike[str]) -> Path:
    """Create `folder` and its parents where missing and return it; raises HastenError when it cannot."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise HastenError(f"Cannot create the folder {path}: {_reason(error)}.") from error
    return path


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Generator[Path]:
    """Fill a folder under a temporary name; it appears as `path` at the end, whole or, after an exception, not at all.

    A folder that was there before stays until then. Raises HastenError when it cannot be written.
    """
    target = Path(os.path.abspath(path))  # noqa: PTH100 - resolving a link would write beside what it points to
    ensure_folder(target.parent)
    mark = secrets.token_hex(4)
    temporary, former = (target.with_name(f".{target.name[:80]}.{mark}.{end}") for end in ("tmp", "old"))
    try:
        temporary.mkdir()
        yield temporary
        if target.exists():
            target.replace(former)
        temporary.replace(target)
    except OSError as error:
        if former.exists() and not target.exists():
            former.replace(target)
        raise HastenError(f"Cannot write the folder {target}: {_reason(error)}.") from error
    finally:
        for rest in (temporary, former):
            shutil.rmtree(rest, ignore_errors=True)


def read_json(path: str | os.PathLike[str]) -> object:
    """Read a JSON file; raises HastenError naming the file, and line and column of what is no JSON."""
    file = Path(path)
    try:
        return json.loads(file.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise HastenError(f"There is no file {file}.") from error
    except OSError as error:
        raise HastenError(f"Cannot read {file}: {_reason(error)}.") from error
    except UnicodeDecodeError as error:
        raise HastenError(f"{file} is not UTF-8 text (byte {error.start}), so it is no JSON file.") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise HastenError(f"{file}, {place}: not valid JSON: {error.msg}.") from error
    except RecursionError as error:
        raise HastenError(f"{file} is nested too deeply.") from error
    except ValueError as error:  # NaN, Infinity, or a number with thousands of digits
        raise HastenError(f"{file} is not valid JSON: {error}.") from error


def json_text(data: object) -> str:
    """JSON with one line per entry, where what fits on a line and holds plain values only is not spread over several.

    Raises HastenError for NaN and infinity.
    """
    try:
        return _laid_out(data, "\n", spread=True) + "\n"
    except ValueError as error:
        raise HastenError("NaN and infinite numbers cannot be written as JSON.") from error


def _laid_out(value: object, newline: str, *, spread: bool = False) -> str:
    deeper = newline + "  "
    if isinstance(value, Mapping) and value:
        mapping = cast("Mapping[str, object]", value)
        entries = [f"{_scalar(key)}: {_laid_out(item, deeper)}" for key, item in mapping.items()]
        flat = "{" + ", ".join(entries) + "}"
        if not spread and _is_flat(mapping.values()) and len(deeper + flat) <= _WIDTH:
            return flat
        return "{" + ",".join(deeper + entry for entry in entries) + newline + "}"
    if isinstance(value, list | tuple):
        items = cast("list[object]", value)
        if _is_flat(items):
            return "[" + ("," if len(items) > _MANY else ", ").join(map(_scalar, items)) + "]"
        return "[" + ",".join(deeper + _laid_out(item, deeper) for item in items) + newline + "]"
    return _scalar(value)


def _is_flat(values: Iterable[object]) -> bool:
    return not any(isinstance(value, Mapping | list | tuple) for value in values)


def _scalar(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it contains {name}")


def _write_through(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def ensure_writable(folder: str | os.PathLike[str]) -> Path:
    """Check that files can be made in `folder`, before any long work begins, and leave no trace.

    A missing folder is created and removed again, so that a job refused later leaves none behind.
    """
    path = Path(folder)
    missing = list(itertools.takewhile(lambda one: not one.exists(), (path, *path.parents)))
    try:
        ensure_folder(path)
        _probe(path)
    finally:
        for one in missing:
            with contextlib.suppress(OSError):
                one.rmdir()
    return path


def _probe(folder: Path) -> None:
    probe = folder / f".hasten-{secrets.token_hex(4)}.tmp"
    try:
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise HastenError(f"Cannot write into the folder {folder}: {_reason(error)}.") from error
