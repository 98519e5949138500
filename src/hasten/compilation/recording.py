"""Recorded denoiser calls: inputs are copied to fixed places, one recording is replayed, outputs are copied out.

The rules are those of PyTorch's notes on CUDA graphs (docs.pytorch.org/docs/stable/notes/cuda.html): static addresses,
a warm-up on a side stream, nothing that waits. The recorder that knows CUDA is separate, so that all else is tested
without a GPU.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeGuard

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from hasten.compilation.settings import settings_of

WARM_UPS = 2
"""Plain calls before a recording, in which kernels are chosen, compiled and given their workspaces."""

MOST_RECORDINGS = 64
"""Recordings in the life of a session, after which a model that keeps changing is called plainly."""

_PLAIN = (bool, int, float, str, type(None))


class Recorder(Protocol):
    """Records what a function launches on a device."""

    def warm(self, run: Callable[[], object]) -> None:
        """Run a function where its launches do not disturb others."""

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record a function; returns what replays it, and its output, which each replay overwrites."""
        ...


class CudaRecorder:
    """CUDA graphs of one device, in one memory pool: no two replay at a time, and outputs are copied at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def warm(self, run: Callable[[], object]) -> None:
        """Run on a side stream."""
        stream, present = torch.cuda.Stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(present)
        with torch.cuda.stream(stream):
            run()
        present.wait_stream(stream)

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Capture into a graph."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = run()
        return graph.replay, output


@dataclass
class Recordings:
    """Counts of one session."""

    recorded: int = 0
    replayed: int = 0
    changes: int = 0
    """How often weights, adapters or settings changed, so that everything was recorded anew."""
    plain: Counter[str] = field(default_factory=Counter[str])
    """Calls that were made plainly, by reason."""

    def in_words(self) -> str:
        """What happened, one clause."""
        words = f"{self.replayed} denoiser calls replayed from {self.recorded} recordings"
        if self.changes:
            words += f", made anew {self.changes} times because weights, adapters or settings had changed"
        plain = ", ".join(f"{count} because {reason}" for reason, count in self.plain.items())
        return f"{words}; called plainly: {plain}" if plain else words


@dataclass
class _Recording:
    """One recorded call: where its inputs are, what replays it, and where its output is."""

    form: TreeSpec
    signature: tuple[object, ...]
    inputs: list[Any]
    replay: Callable[[], None]
    output: Any
    replays: int = 0

    def fill(self, leaves: list[Any]) -> None:
        for place, value in zip(self.inputs, leaves, strict=True):
            if isinstance(place, torch.Tensor):
                place.copy_(value, non_blocking=True)

    def run(self, leaves: list[Any]) -> Any:
        self.fill(leaves)
        self.replay()
        return tree_map(_copied, self.output)


class RecordedCall:
    """Stands in for the call of one network; one per network and session."""

    def __init__(
        self, module: nn.Module, inner: Callable[..., Any], recorder: Recorder, counts: Recordings,
        *, limit: int, timestep: str, device: torch.device,
    ) -> None:  # fmt: skip
        self._module, self._inner, self._recorder, self.counts = module, inner, recorder, counts
        self._limit, self._timestep, self._device = limit, timestep, device
        self._timestep_place = list(inspect.signature(module.forward).parameters).index(timestep)
        self._recordings: list[_Recording] = []
        self._settings: object = None
        self._refused = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Replay the recording for inputs of this kind; record one first, or call plainly, and count why."""
        args = self._with_tensor_timestep(args, kwargs)
        leaves, form = tree_flatten((args, kwargs))
        self._notice_changes()
        found = self._find(form, signature := _signature(leaves))
        reason = "" if found else self._obstacle(leaves)
        if not found and not reason:
            found, reason = self._record(form, signature, leaves)
        if found is None:
            self.counts.plain[reason] += 1
            return self._inner(*args, **kwargs)
        return self._replay(found, leaves, args, kwargs)

    def forget(self) -> None:
        """Drop all recordings and their memory."""
        self._recordings.clear()

    def _notice_changes(self) -> None:
        settings = settings_of(self._module)
        if settings != self._settings:
            self.counts.changes += self._settings is not None and bool(self._recordings)
            self._settings = settings
            self.forget()

    def _find(self, form: TreeSpec, signature: tuple[object, ...]) -> _Recording | None:
        return next((r for r in self._recordings if r.signature == signature and r.form == form), None)

    def _obstacle(self, leaves: list[Any]) -> str:
        """Why this kind of call is not recorded; empty when it can be."""
        if torch.is_grad_enabled():
            return "gradients are tracked; use torch.no_grad()"
        strange = next((leaf for leaf in leaves if not isinstance(leaf, (torch.Tensor, *_PLAIN))), None)
        if strange is not None:
            return f"an argument is a {type(strange).__name__}"
        if self._refused:
            return self._refused
        if len(self._recordings) >= self._limit:
            return f"max_graphs={self._limit} kinds of calls are recorded"
        if self.counts.recorded >= MOST_RECORDINGS:
            return "weights or settings change all the time"
        return ""

    def _record(
        self, form: TreeSpec, signature: tuple[object, ...], leaves: list[Any]
    ) -> tuple[_Recording | None, str]:
        inputs = [self._place(leaf) for leaf in leaves]

        def run() -> Any:
            args, kwargs = tree_unflatten(inputs, form)
            return self._inner(*args, **kwargs)

        for _ in range(WARM_UPS):
            self._recorder.warm(run)
        self._settings = settings_of(self._module)  # tables made in the first call are no change
        try:
            replay, output = self._recorder.record(run)
        except RuntimeError as error:
            self._refused = f"the call cannot be recorded ({_first_line(error)})"
            return None, self._refused
        self._recordings.append(_Recording(form, signature, inputs, replay, output))
        self.counts.recorded += 1
        return self._recordings[-1], ""

    def _place(self, leaf: Any) -> Any:
        """A fixed place for a tensor, on the device: nothing can be fetched from elsewhere in a replay."""
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return torch.empty_like(leaf, device=self._device, requires_grad=False).copy_(leaf)

    def _replay(self, found: _Recording, leaves: list[Any], args: Any, kwargs: Any) -> Any:
        output = found.run(leaves)
        found.replays += 1
        # The first replay repeats the recorded call; the second is the first with other inputs.
        if found.replays == 2 and (error := _difference(output, expected := self._inner(*args, **kwargs))):
            self._refused = f"a replay was {error:.1g} off a plain call: something in it changes from step to step"
            self.forget()
            self.counts.plain[self._refused] += 1
            return expected
        self.counts.replayed += 1
        return output

    def _with_tensor_timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """A timestep given as a number would need a recording for each step: it becomes a tensor."""
        if _is_number(number := kwargs.get(self._timestep)):
            kwargs[self._timestep] = torch.full((), number, device=self._device)
        place = self._timestep_place
        if place < len(args) and _is_number(number := args[place]):
            return (*args[:place], torch.full((), number, device=self._device), *args[place + 1 :])
        return args


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _signature(leaves: list[Any]) -> tuple[object, ...]:
    """What must be the same for a recording to fit: of tensors shape, layout, type and device; other values all."""
    modes = (torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cuda"))
    return (*modes, *(_kind(leaf) for leaf in leaves))


def _kind(leaf: Any) -> object:
    if isinstance(leaf, torch.Tensor):
        return (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
    return (type(leaf), leaf) if isinstance(leaf, _PLAIN) else type(leaf)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _difference(output: Any, expected: Any) -> float:
    """The relative distance of two outputs, or 0 where it is within what other kernels for the same sums make."""
    pairs = zip(tree_leaves(output), tree_leaves(expected), strict=True)
    worst = 0.0
    for one, other in ((a, b) for a, b in pairs if isinstance(a, torch.Tensor)):
        distance = float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-12))
        allowed = 1e-4 if other.dtype == torch.float32 else 5e-3
        worst = max(worst, distance if not distance <= allowed else 0.0)
    return worst


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
