"""Where hasten keeps what it has measured on this machine, as the XDG base directory specification says."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache() -> Path:
    """`HASTEN_CACHE_DIR` where set, else `hasten` in `XDG_CACHE_HOME` or `~/.cache`; it need not exist yet."""
    if own := os.environ.get("HASTEN_CACHE_DIR"):
        return Path(own).expanduser()
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that relative paths there are to be ignored.
    base = Path(given) if Path(given).is_absolute() else Path("~/.cache").expanduser()
    return base / "hasten"
