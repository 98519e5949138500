"""Compiled code kept on disk from process to process, so that the second one starts warm.

What is kept is PyTorch's own bundle (`torch.compiler.save_cache_artifacts`) and, for the CPU, the compiled libraries.
A file belongs to one environment: device, versions, model configuration and recipe. It begins with a line that says
what it is and a checksum; a file that does not fit them, or belongs to another user, is left alone with a warning.
PyTorch unpickles and loads what is in it, so that the folder deserves the trust one gives to installed programs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hasten.compilation.libraries import loaded_libraries, packed, put_back, unpacked
from hasten.core.errors import HastenError
from hasten.core.files import atomic_write_bytes
from hasten.core.identity import config_hash
from hasten.core.target import Target
from hasten.core.technique import Technique
from hasten.core.user_cache import user_cache

MAGIC = b"hasten compiled code 1 "
_PACKAGES = ("torch", "triton", "diffusers", "transformers", "hasten")


class ArtifactStore:
    """One file of compiled code: loaded once, written again when something has been compiled since."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._saved = 0

    def load(self) -> int:
        """Hand the file's content to PyTorch's caches; returns its size in bytes, 0 when there is none to use."""
        if (found := _read(self.path)) is None:
            return 0
        bundle, libraries = found
        put_back(libraries)
        return len(bundle) if torch.compiler.load_cache_artifacts(bundle) is not None else 0

    def save(self, graphs: int, cached: int) -> int:
        """Write the compiled code of this process, unless the file has it: all that did not come from a cache is saved.

        Returns the size in bytes, 0 when nothing was written; a folder that cannot be written costs a warning.
        """
        fresh, missing = graphs - cached, not self.path.exists()
        if (
            not graphs
            or (fresh <= self._saved and not missing)
            or (bundle := torch.compiler.save_cache_artifacts()) is None
        ):
            return 0
        content = packed(bundle[0], loaded_libraries())
        try:
            atomic_write_bytes(self.path, MAGIC + hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        except HastenError as error:
            warnings.warn(f"Compiled code was not kept for the next process: {error}", stacklevel=2)
            return 0
        self._saved = fresh
        return len(content)


def store_for(target: Target, recipe: Iterable[Technique]) -> ArtifactStore:
    """The file for this environment, model and recipe, in the user's cache folder."""
    identity = json.dumps([environment(target.device), _model(target), sorted(map(repr, recipe))], sort_keys=True)
    name = f"{target.architecture}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.bin"
    return ArtifactStore(user_cache() / "compiled" / name)


def environment(device: torch.device) -> dict[str, str]:
    """What decides whether compiled code can run here: versions, system and device."""
    found = {name: _version(name) for name in _PACKAGES}
    found |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    if device.type == "cuda":
        found["device"] = f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_capability(device)}"
        found["cuda"] = str(torch.version.cuda)
    else:
        found["device"] = f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    return found


def _model(target: Target) -> list[str]:
    return [f"{d.name} {config_hash(d)} {target.dtype}" for d in target.denoisers]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _read(path: Path) -> tuple[bytes, dict[str, bytes]] | None:
    """The checked bundle and libraries of a file; None, with a warning, when it cannot be used."""
    if not path.is_file():
        return None
    try:
        if problem := _foreign(path):
            raise HastenError(problem)
        return unpacked(_checked(path.read_bytes()))
    except (OSError, HastenError) as error:
        warnings.warn(f"The compiled code in {path} is ignored and will be made again: {error}", stacklevel=2)
        return None


def _checked(data: bytes) -> bytes:
    head, _, content = data.partition(b"\n")
    if not head.startswith(MAGIC):
        raise HastenError("it was not written by this version of hasten.")
    if head.removeprefix(MAGIC) != hashlib.sha256(content).hexdigest().encode():
        raise HastenError("it is damaged (its checksum does not fit).")
    return content


def _foreign(path: Path) -> str:
    """Why a file is not to be trusted; empty when it is the user's own."""
    if not hasattr(os, "getuid"):
        return ""
    return "" if path.stat().st_uid == os.getuid() else "it belongs to another user."
