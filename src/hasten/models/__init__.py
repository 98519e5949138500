"""Loads models: the bundled ones by name, local folders, and hub ids."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

from hasten.core.errors import HastenError, UnknownName
from hasten.core.files import read_json
from hasten.core.workload import Workload

DEFAULT = "emoji-flux"
"""The bundled model that commands use when none is named."""

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_LONGEST_LINK = 1024

GENERAL_PROMPTS = (
    "a red fox in the snow, morning light",
    "a street market at night, rain, neon signs",
    "an old sailor's portrait, oil painting",
    "a bowl of fruit on a wooden table",
)
"""Prompts for models that bring none."""


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline with the name it was asked by and its default workload."""

    name: str
    pipeline: Any
    workload: Workload


def bundled() -> dict[str, Path]:
    """The models that come with hasten, by name."""
    root = Path(str(resources.files("hasten"))) / "models"
    return {entry.name: entry for entry in sorted(root.iterdir()) if (entry / "model_index.json").is_file()}


def find_folder(name: str) -> Path | None:
    """The local folder a model name stands for; None means a hub id. Raises for what can be neither."""
    if name in bundled():
        return bundled()[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.exists():
        raise HastenError(f"{name} is a file; a model is a diffusers folder with a model_index.json.")
    owner, separator, rest = name.partition("/")
    if separator and owner not in ("", ".", "..", "~") and rest and "/" not in rest:
        return None
    raise UnknownName("bundled model or local folder", name, bundled())


def load(
    name: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    components: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, str] | None = None,
) -> LoadedModel:
    """Load a pipeline by bundled name, local folder or hub id, onto `device` (default: a GPU if there is one).

    `dtype` is a torch type's name; the default is float32 on the CPU and bfloat16 on a GPU, or what `dtypes` says for
    a component. `components` take the places of the folder's own, which are not read. Raises HastenError for unknown
    names, folders that hold no pipeline, and damaged weight files; OutOfMemory where it does not fit.
    """
    from hasten.core.memory_limit import within_memory

    folder = find_folder(name)
    where = device_for(device)
    found = {key: dtype_named(value) for key, value in (dtypes or {}).items()} if dtype is None else {}
    found["default"] = dtype_named(dtype_for(where, dtype))
    pipeline = _load_pipeline(name, folder, found if len(found) > 1 else found["default"], components or {})
    try:
        pipeline = within_memory(lambda: pipeline.to(where), name)
    except (RuntimeError, AssertionError) as error:
        raise HastenError(f"The device {where!r} cannot be used: {_first_line(error)}") from None
    pipeline.set_progress_bar_config(disable=True)
    return LoadedModel(name, pipeline, default_workload(folder))


def device_for(device: str | None) -> str:
    """The device that is meant: by default a GPU if there is one."""
    import torch

    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def dtype_for(device: str, dtype: str | None) -> str:
    """The name of the type that is meant: by default float32 on the CPU and bfloat16 elsewhere."""
    return dtype or ("float32" if device.startswith("cpu") else "bfloat16")


def dtype_named(name: str) -> Any:
    """The torch floating-point type of that name, such as `float16`."""
    import torch

    known = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if name not in known:
        raise UnknownName("floating-point type", name, known)
    return known[name]


def default_workload(folder: Path | None) -> Workload:
    """The workload a model folder recommends in `workload.json`, or a general one."""
    file = folder / "workload.json" if folder else None
    if file is None or not file.is_file():
        return Workload(prompts=GENERAL_PROMPTS)
    data = read_json(file)
    if not isinstance(data, dict):
        raise HastenError(f"{file} holds no table of workload settings.")
    values: dict[str, Any] = dict(cast("dict[str, Any]", data))
    values.setdefault("prompts", GENERAL_PROMPTS)
    try:
        return Workload(**values)
    except TypeError as error:
        raise HastenError(f"{file}: {error}.") from None


def check_safetensors(file: Path) -> None:
    """Raise HastenError when a safetensors file is not as long as its header says, or has no valid header."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise HastenError(f"{file} is damaged: it is truncated within its header ({size} bytes).")
        expected = 8 + length + _end_of_data(handle.read(length), file)
    if expected != size:
        raise HastenError(f"{file} is damaged: it has {size} bytes where its header promises {expected}.")


def _end_of_data(header: bytes, file: Path) -> int:
    try:
        entries = cast("dict[str, dict[str, list[int]]]", json.loads(header))
        return max((e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise HastenError(f"{file} is damaged: its header is not valid.") from None


def _load_pipeline(name: str, folder: Path | None, torch_dtype: Any, components: Mapping[str, Any]) -> Any:
    import diffusers

    lost = _lost_links(folder) if folder else {}
    for file in sorted(folder.rglob("*.safetensors")) if folder else ():
        if file not in lost.values():
            check_safetensors(file)
    try:
        shared = {part: _shared(part, torch_dtype) for part in lost if part not in components}
        components = {**shared, **components}
        return diffusers.DiffusionPipeline.from_pretrained(str(folder or name), torch_dtype=torch_dtype, **components)
    except Exception as error:
        if folder:
            raise HastenError(f"Cannot load the folder {folder}: {_first_line(error)}") from error
        hint = f"Models that need no download: {', '.join(bundled())}."
        raise HastenError(f"Cannot load {name!r} from the model hub: {_hub_problem(error)} {hint}") from error


def _lost_links(folder: Path) -> dict[str, Path]:
    """Weights of a bundled model that are a link to those of `DEFAULT`, where the link itself is lost, by component.

    Archives and Git on Windows may drop links, or put a text file in the place of one.
    """
    if folder not in bundled().values():
        return {}
    wanted = {config.parent.name: config.parent / _WEIGHTS for config in folder.glob("vae/config.json")}
    return {part: file for part, file in wanted.items() if not file.is_file() or file.stat().st_size < _LONGEST_LINK}


def _shared(part: str, torch_dtype: Any) -> Any:
    import diffusers

    dtype = torch_dtype.get(part, torch_dtype["default"]) if isinstance(torch_dtype, dict) else torch_dtype
    return diffusers.AutoModel.from_pretrained(str(bundled()[DEFAULT]), subfolder=part, torch_dtype=dtype)


HUB_PROBLEMS = (
    ("GatedRepoError", "its licence must be accepted on the hub first, by an account that is logged in here."),
    ("RepositoryNotFoundError", "there is no such model, or it is private."),
    ("OfflineModeIsEnabled", "HF_HUB_OFFLINE is set, and the model is not in the local cache."),
    ("NetworkError", "the hub cannot be reached, and the model is not in the local cache."),
    ("TimeoutException", "the hub does not answer, and the model is not in the local cache."),
)
"""What the libraries' errors mean; the hub's own come first because they derive from the network's."""


def _hub_problem(error: BaseException) -> str:
    """The cause in plain words: diffusers' own message speaks of the cache even when the model does not exist."""
    kinds = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    return next((words for kind, words in HUB_PROBLEMS if kind in kinds), _first_line(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _checked_folder(path: Path) -> Path:
    if not (path / "model_index.json").is_file():
        raise HastenError(f"The folder {path} holds no diffusers pipeline: it has no model_index.json.")
    index = read_json(path / "model_index.json")
    if not isinstance(index, dict) or "_class_name" not in index:
        raise HastenError(f"{path / 'model_index.json'} names no pipeline class (_class_name).")
    return path


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith((".", "!", "?")) else f"{text}."
