"""Amounts of memory as people write them, and back."""

from __future__ import annotations

import re

from hasten.core.errors import InvalidSetting

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Read `8GB`, `512MiB` or a plain number of bytes; GB is 10^9 bytes, GiB is 2^30."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2].upper() not in UNITS:
        raise InvalidSetting(f"{text!r} is no amount of memory; write it like '8GB' or '512MiB'.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def in_words(count: int) -> str:
    """An amount of memory with three digits: `23.8 GB`, `512 MB`, `1.2 kB`, `17 bytes`."""
    for size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if abs(count) >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"
