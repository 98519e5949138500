"""Files of statistics: safetensors with what they are of in the header, read layer by layer."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch

from hasten.core.errors import HastenError
from hasten.core.files import ensure_folder
from hasten.core.user_cache import user_cache
from hasten.quantize.engine.statistics import InputStatistics, Sums, block_size
from hasten.quantize.engine.watching import Statistics, WatchedLayer, Watcher

SCHEMA = 2
_HEADER = "hasten_statistics"


def usual_file(weights: str) -> Path:
    """Where statistics for a model are kept, by the hash of its weights."""
    return user_cache() / "statistics" / f"{weights[:32]}.safetensors"


def save_statistics(file: Path, watcher: Watcher, about: Mapping[str, Any], *, finished: bool = True) -> Path:
    """Write what a watcher has seen, and what it is of, `weights_sha256`, `prompts`, `steps`, ...

    An unfinished file holds both halves of each input, so that it can be gone on from. An old file stays until all is
    written.
    """
    tensors: dict[str, torch.Tensor] = {}
    layers, counts = watcher.layers, dict[str, list[int]]()
    for name in sorted({layer.input for layer in layers.values()}):
        sums = watcher.sums(name)
        counts[name] = list(sums.counts)
        parts = {"absmax": sums.absmax, "mean_abs": sums.mean_abs}
        parts |= {"second": sums.statistics().check(name).second} if finished else {"halves": sums.halves}
        tensors |= {f"{name}:{part}": tensor.contiguous().cpu() for part, tensor in parts.items()}
    watched = {name: [layer.input, layer.outputs] for name, layer in layers.items()}
    header = {"schema": SCHEMA, **about, "finished": finished, "counts": counts, "layers": watched}
    return _write(file, tensors, json.dumps(header))


def _write(file: Path, tensors: dict[str, torch.Tensor], header: str) -> Path:
    from safetensors.torch import save_file

    temporary = ensure_folder(file.parent) / f".{file.name}.{secrets.token_hex(4)}.tmp"
    try:
        save_file(tensors, temporary, metadata={_HEADER: header})
        temporary.replace(file)
    except OSError as error:
        raise HastenError(f"Cannot write {file}: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return file


class StatisticsFile:
    """A file of statistics, opened: its header is checked, tensors are read when they are needed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.is_file():
            raise HastenError(f"There is no file of statistics {file}.")
        self.about = self._header()
        self.counts = cast("dict[str, list[int]]", self.about["counts"])
        layers = cast("dict[str, tuple[str, int]]", self.about["layers"])
        self.statistics = Statistics({k: WatchedLayer(str(v[0]), int(v[1])) for k, v in layers.items()}, self.read)

    @property
    def weights(self) -> str:
        """Hash of the weights that they are of."""
        return str(self.about.get("weights_sha256", ""))

    @property
    def finished(self) -> bool:
        """Were all pictures watched?"""
        return self.about.get("finished") is True

    def read(self, name: str) -> InputStatistics:
        """The statistics of an input by the name of its first layer."""
        if not self.finished:
            return self.sums(name).statistics().check(name)
        absmax, mean_abs, second = self._tensors(name, "absmax", "mean_abs", "second")
        return InputStatistics(sum(self.counts[name]), absmax, mean_abs, second).check(name)

    def sums(self, name: str) -> Sums:
        """Both halves of an input, of an unfinished file."""
        first, second = self.counts[name]
        return Sums((first, second), *self._tensors(name, "absmax", "mean_abs", "halves"))

    def _tensors(self, name: str, *parts: str) -> tuple[torch.Tensor, ...]:
        absmax, mean_abs, second = (self._tensor(f"{name}:{part}") for part in parts)
        inputs = absmax.numel()
        size = block_size(inputs)
        if mean_abs.shape != (inputs,) or second.shape[-3:] != (inputs // size, size, size):
            raise HastenError(f"{self.file} is damaged: the statistics of {name} do not fit together.")
        return absmax, mean_abs, second

    def _tensor(self, name: str) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as opened:
                return cast(torch.Tensor, opened.get_tensor(name)).float()
        except (SafetensorError, OSError) as error:
            raise HastenError(f"{self.file} is damaged: it has no readable {name}.") from error

    def _header(self) -> dict[str, Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as opened:
                data: object = json.loads((opened.metadata() or {})[_HEADER])
        except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
            raise HastenError(f"{self.file} is no file of statistics; `hasten calibrate` makes one.") from error
        header = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
        if header.get("schema") != SCHEMA or not {"counts", "layers"} <= set(header):
            raise HastenError(f"{self.file} was written by another version of hasten; calibrate again.")
        return header
