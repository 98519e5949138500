"""Spreads a pipeline, or a single model, over several devices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, cast, get_args

import torch

from hasten.core.errors import InvalidSetting, NotEngaged, nearest
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Decision, Evidence, Stage, Technique, about
from hasten.core.workload import Workload
from hasten.memory.engine.balance import How, TooLarge
from hasten.memory.engine.borders import Borders, intercept_borders, put
from hasten.memory.engine.moving import special_weights
from hasten.memory.engine.placement import Placed, Tree, as_dictionary, automatic, read_map
from hasten.memory.engine.places import (
    as_text,
    canonical,
    device_of,
    read_memory,
    read_pairs,
    unknown_place,
    usable_memory,
)
from hasten.memory.engine.sizes import in_words
from hasten.memory.engine.weights import all_tensors, size_of

AUTOMATIC = get_args(How)


@dataclass(frozen=True, kw_only=True)
class PlacedEvidence(Evidence):
    """Evidence of a placement, with the map that it amounts to."""

    device_map: Mapping[str, str] = field(default_factory=dict[str, str])
    """Names of components and modules, with ranges of blocks, and their devices; `DeviceMap(map=...)` takes it."""


@dataclass(frozen=True, kw_only=True)
class DeviceMap(Technique):
    """Puts components, blocks or any other modules on the devices that a map names, and moves tensors between them.

    `balanced` gives each GPU the same share of the weights, `balanced_low_0` leaves the first one as empty as it can,
    `sequential` fills one after the other. A map of one's own names components and modules: the longest name wins,
    `0-9` stands for ten blocks, `*` for everything not named. Nothing runs at the same time on two devices, so this
    makes room, not speed: each block on another device than its surroundings has its inputs brought and its outputs
    brought back in each call. Everything returns to where the caller's tensors are, so that caches and adapters work.
    The tests use simulated devices (`cpu:1` and so on, which rehearse a map anywhere), and GPUs where there are any.
    """

    stage: ClassVar[Stage] = Stage.RESIDENCY
    paper: ClassVar[str] = "https://huggingface.co/docs/accelerate/concept_guides/big_model_inference"
    cuts_blocks: ClassVar[bool] = True
    """Equal blocks on two devices are compiled once for each."""

    map: str | Mapping[str, str] = field(
        default="balanced",
        metadata=about(
            "balanced, balanced_low_0, sequential, or names and devices such as "
            "'transformer.transformer_blocks.0-9=cuda:1; transformer=cuda:0; vae=cpu' (Python takes a dictionary too)"
        ),
    )
    memory: str = field(
        default="auto",
        metadata=about(
            "bytes for weights on each device, for the automatic maps, such as 'cuda:0=20GB; cuda:1=10GB; cpu=60GB'; "
            "auto is what is free on each GPU, less a fifth for activations",
            trial="cpu=1GB; cpu:1=1GB",
        ),
    )

    def __post_init__(self) -> None:
        if isinstance(self.map, Mapping):
            object.__setattr__(self, "map", as_text(self.map))
        super().__post_init__()
        for _, place in self._pairs():
            canonical(place)
        if self.memory != "auto":
            read_memory(self.memory)

    def claims(self) -> tuple[str, ...]:
        """The placement of all weights; where a map may cut the denoiser, also what its blocks take from a table."""
        cuts = not self._pairs() or any("." in name for name, _ in self._pairs())
        return ("residency", "modulation") if cuts else ("residency",)

    def waits(self) -> bool:
        """What is brought from a GPU to the CPU has to be waited for."""
        return "cpu" in f"{self.map} {self.memory}"

    def runs_on(self, target: Target) -> torch.device | None:
        """Where the denoiser's own weights are."""
        if target.device.type == "meta" or list(self.problems(target)):
            return None
        return device_of(self._home(target, self._placed(target)[0]))

    def decides(self, target: Target) -> Decision:
        """Tensors change devices inside the denoiser where a map cuts it."""
        names = tuple(f"{denoiser.name}." for denoiser in target.denoisers)
        cut = any(p.name.startswith(names) and p.place != p.above for p in self._placed(target)[0])
        return "borders" if cut else "nothing"

    def problems(self, target: Target) -> Iterable[str]:
        """Needs devices that exist, a map that names every weight once, and room."""
        if target.device.type != "meta":
            yield from filter(None, map(unknown_place, self._places()))
        if not self._pairs() and not self._memory(target):
            yield (
                "there is no GPU to spread weights over; memory='cpu=8GB; cpu:1=8GB' rehearses it in host memory, and "
                "map='*=cpu' puts everything on the CPU."
            )
            return
        try:
            yield from self._placed(target)[1]
        except TooLarge as error:
            yield str(error)
        yield from _immovable(target)

    def apply(self, target: Target, patch: Patch) -> None:
        """Bring the weights to their devices and intercept the calls at the borders."""
        placed, _ = self._placed(target)
        state = patch.keep(_Spread(placed, Borders(self._home(target, placed))))
        for piece in placed:
            if piece.tensors:
                patch.undo(piece.module, f"weights are on {piece.place}", put(piece))
        intercept_borders(placed, state.borders, patch)

    def engaged(self, session: Session) -> Evidence:
        """The weights are where the map says, and tensors passed the borders."""
        state = session.state(self, _Spread)
        borders, sizes = state.borders, dict[str, int]()
        if not borders.calls:
            raise NotEngaged("no placed module was called.")
        for piece in state.placed:
            if any(tensor.device != device_of(piece.place) for tensor in piece.tensors):
                raise NotEngaged(f"weights of {piece.name} are not on {piece.place} any more.")
            sizes[piece.place] = sizes.get(piece.place, 0) + piece.bytes
        shown = as_dictionary(state.placed)
        listed = ", ".join(f"{place} holds {in_words(size)}" for place, size in sizes.items())
        return PlacedEvidence(
            summary=f"{listed}; {borders.crossings} of {borders.calls} calls crossed a border, with "
            f"{in_words(borders.bytes)} of tensors; device_map: {shown}",
            device_map=shown,
        )

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Memory on the device of the denoiser; the time of passing borders only a measurement can tell."""
        if list(self.problems(target)):
            return Cost(basis="measured")
        placed, _ = self._placed(target)
        home = self._home(target, placed)
        held = dict.fromkeys(target.modules, 0)
        for piece in placed:
            held[piece.name.partition(".")[0]] += piece.bytes if piece.place == home else 0
        fewer = {name: size for name, size in held.items() if size < size_of(target.modules[name])}
        return Cost(held=fewer, basis="measured")

    def _pairs(self) -> list[tuple[str, str]]:
        """Names and devices of an explicit map."""
        text = cast(str, self.map).strip()
        if text in AUTOMATIC:
            return []
        if "=" not in text and ";" not in text:
            raise InvalidSetting(
                f"DeviceMap(map={text!r}): neither a map, such as 'transformer=cuda:0; vae=cpu', nor an automatic one. "
                f"{nearest(text, AUTOMATIC)}"
            )
        return read_pairs(text, "the map")

    def _places(self) -> list[str]:
        pairs = self._pairs()
        named = [canonical(place) for _, place in pairs]
        return list(dict.fromkeys(named or (read_memory(self.memory) if self.memory != "auto" else ())))

    def _memory(self, target: Target) -> dict[str, int]:
        if self.memory != "auto":
            return read_memory(self.memory)
        present: dict[str, int] = {}
        for module in target.modules.values():
            for tensor in all_tensors(module):
                place = canonical(str(tensor.device))
                present[place] = present.get(place, 0) + tensor.numel() * tensor.element_size()
        return usable_memory(present)

    def _placed(self, target: Target) -> tuple[list[Placed], list[str]]:
        tree = Tree(target)
        if pairs := self._pairs():
            return read_map(tree, pairs)
        return automatic(tree, self._memory(target), cast(How, cast(str, self.map).strip())), []

    def _home(self, target: Target, placed: Iterable[Placed]) -> str:
        return next(piece.place for piece in placed if piece.name == target.denoisers[0].name)


@dataclass
class _Spread:
    """The run-time state: what is where, and what passes between."""

    placed: list[Placed]
    borders: Borders


def _immovable(target: Target) -> Iterator[str]:
    for name, module in target.modules.items():
        yield from special_weights(name, all_tensors(module))
        if any(getattr(part, "_hf_hook", None) is not None for part in module.modules()):
            yield f"the {name} is placed by accelerate or diffusers; take that off first (reset_device_map)."
