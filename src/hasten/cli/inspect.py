"""`hasten inspect`: what hasten sees in a model, and which techniques apply."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Column, Table

from hasten.cli.common import DeviceOption, DtypeOption, ModelArgument, out, quiet, reports_errors
from hasten.core.errors import UnknownName

if TYPE_CHECKING:
    from torch import nn

    from hasten.core.target import Denoiser, Target


@reports_errors
def inspect(model: ModelArgument, device: DeviceOption = None, dtype: DtypeOption = None) -> None:
    """Show denoiser, block stacks, streams and sizes, and which techniques apply or why they do not.

    MODEL may also be a released model's name, such as FLUX.1-dev: then nothing is downloaded or loaded.
    """
    quiet()
    target = _target(model, device, dtype)
    out.print(f"[bold]{target.title}[/]", highlight=False)
    out.print(_components(target))
    for denoiser in target.denoisers:
        out.print(_structure(denoiser))
    out.print(_techniques(target))


def _target(model: str, device: str | None, dtype: str | None) -> Target:
    from hasten.core.target import Target, released_models
    from hasten.formats.loading import load
    from hasten.models import bundled, find_folder

    if model.casefold() in {name.casefold() for name in released_models()}:
        return Target.planned(model)
    try:
        find_folder(model)
    except UnknownName:
        raise UnknownName("model", model, [*bundled(), *released_models()]) from None
    return Target.of(load(model, device=device, dtype=dtype).pipeline)


def _components(target: Target) -> Table:
    table = _table("Components", "component", "class", "parameters", "size", "dtype")
    for name, module in target.modules.items():
        count, size = _weights(module)
        dtype = str(next(module.parameters()).dtype).removeprefix("torch.") if count else ""
        table.add_row(name, type(module).__name__, _short(count), f"{size / 2**20:,.1f} MiB", dtype)
    if target.scheduler is not None:
        table.add_row("scheduler", type(target.scheduler).__name__, "", "", "")
    return table


def _table(title: str, *columns: str) -> Table:
    """A table that wraps long class names where the terminal is narrow, instead of cutting them off."""
    return Table(*(Column(name, overflow="fold") for name in columns), title=title, title_justify="left")


def _weights(module: nn.Module) -> tuple[int, int]:
    """How many numbers a network's weights are, and their bytes, be they in codes or plain."""
    from hasten.kernels.modules import Quantized

    parameters = list(module.parameters())
    coded = [layer for layer in module.modules() if isinstance(layer, Quantized)]
    count = sum(p.numel() for p in parameters) + sum(math.prod(layer.shape) for layer in coded)
    buffers = (buffer.nbytes for layer in coded for buffer in layer.buffers(recurse=False))
    return count, sum(p.numel() * p.element_size() for p in parameters) + sum(buffers)


def _structure(denoiser: Denoiser) -> Table:
    spec = denoiser.spec
    title = f"{denoiser.name}: {spec.name} architecture, guidance {spec.guidance}"
    table = _table(title, "where", "what", "streams")
    for stack in spec.stacks:
        streams = ", ".join(f"{name} (picture)" if name == stack.denoised else name for name in stack.takes)
        table.add_row(stack.path, f"{len(denoiser.stack(stack))} x {stack.block}", streams)
    for path, what in _unet(denoiser):
        table.add_row(path, what, "")
    attention = list(denoiser.of_class(*spec.attention))
    table.add_row("attention", f"{len(attention)} modules ({', '.join(spec.attention) or 'unknown'})", "")
    return table


def _unet(denoiser: Denoiser) -> Iterator[tuple[str, str]]:
    stages = denoiser.spec.unet
    if stages is None:
        return
    for path in (stages.down, stages.mid, stages.up):
        module = denoiser.module.get_submodule(path)
        parts = [type(module).__name__] if path == stages.mid else [type(c).__name__ for c in module.children()]
        yield path, ", ".join(parts)


def _techniques(target: Target) -> Table:
    from hasten.core.registry import family, techniques

    table = _table("Techniques", "technique", "family", "applies")
    for name, cls in techniques().items():
        problems = list(cls.trial().problems(target))
        table.add_row(name, family(cls), "[green]yes[/]" if not problems else " ".join(problems))
    return table


def _short(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"
