"""Where hasten keeps files of its own on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder(*parts: str) -> Path:
    """The folder for files that can be made again; it need not exist yet.

    `HASTEN_CACHE_DIR` names it, otherwise it is `hasten` in the user's cache folder as the system has it.
    """
    if own := os.environ.get("HASTEN_CACHE_DIR"):
        return Path(own).expanduser().joinpath(*parts)
    return _users_cache().joinpath("hasten", *parts)


def _users_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
