"""The compiled libraries that inductor makes for the CPU: PyTorch's own bundle holds only their source text."""

from __future__ import annotations

import json
import sys
from pathlib import Path, PurePosixPath
from typing import cast

from hasten.core.errors import HastenError
from hasten.core.files import atomic_write_bytes


def inductor_folder() -> Path:
    """Where inductor keeps compiled code in this process."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()).resolve()


def loaded_libraries() -> dict[str, bytes]:
    """The libraries of inductor that this process has loaded, by path relative to its folder (Linux; else none).

    With them those by which inductor has found out what this processor can do; their names have no second ending.
    """
    maps, folder = Path("/proc/self/maps"), inductor_folder()
    if sys.platform != "linux" or not maps.is_file():
        return {}
    paths = {Path(line.split(maxsplit=5)[5]) for line in maps.read_text().splitlines() if line.endswith(".so")}
    paths |= {path for path in folder.glob("*/*.so") if "." not in path.stem}
    ours = sorted(path for path in paths if path.is_relative_to(folder) and path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in ours}


def packed(bundle: bytes, libraries: dict[str, bytes]) -> bytes:
    """PyTorch's bundle and libraries as one text of bytes: a line of JSON with the sizes, then the contents."""
    sizes = {"bundle": len(bundle), "libraries": {name: len(content) for name, content in libraries.items()}}
    return b"".join([json.dumps(sizes).encode(), b"\n", bundle, *libraries.values()])


def unpacked(content: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The inverse of `packed`; raises HastenError for what it cannot have made."""
    head, _, rest = content.partition(b"\n")
    try:
        sizes = cast("dict[str, dict[str, int]]", json.loads(head))
        first, parts = cast(int, sizes["bundle"]), dict(sizes["libraries"])
    except (ValueError, KeyError, TypeError) as error:
        raise HastenError("its table of contents cannot be read.") from error
    libraries, at = dict[str, bytes](), first
    for name, size in parts.items():
        _check_name(name)
        libraries[name] = rest[at : at + size]
        at += size
    if at != len(rest):
        raise HastenError("its table of contents does not fit its size.")
    return rest[:first], libraries


def put_back(libraries: dict[str, bytes]) -> None:
    """Write libraries where inductor looks for them, unless they are there."""
    folder = inductor_folder()
    for name, content in libraries.items():
        if not (folder / name).exists():
            atomic_write_bytes(folder / name, content)


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or path.suffix != ".so":
        raise HastenError(f"it holds a file of an unexpected name ({name!r}).")
