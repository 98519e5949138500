"""What every training program here shares: EMA, optimisers, time-based schedule, log, checkpoints."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Ema:
    """Exponential moving average of trainable parameters, warmed up as min(decay, (1 + n) / (10 + n))."""

    def __init__(self, module: nn.Module, decay: float = 0.9995) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average one step towards the parameters."""
        self.updates += 1
        rate = 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self.module.parameters()], rate)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averaged weights into a module of the same layout."""
        for name, parameter in module.named_parameters():
            parameter.copy_(self.shadow[name])


def matrices(module: nn.Module, glob: str = "blocks.") -> list[nn.Parameter]:
    """The weight matrices inside transformer blocks: what Muon may train."""
    return [
        p
        for name, p in module.named_parameters()
        if glob in name and p.ndim == 2 and ".emb." not in name and "norm" not in name
    ]


class Optimisers:
    """AdamW for everything; Muon (orthogonalised momentum) for the listed matrices; one learning-rate factor."""

    def __init__(self, module: nn.Module, lr: float, muon: Iterable[nn.Parameter] = (), muon_lr: float = 0.0) -> None:
        chosen = list(muon)
        ids = {id(p) for p in chosen}
        rest = [p for p in module.parameters() if p.requires_grad and id(p) not in ids]
        fused = rest[0].is_cuda
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr, (0.9, 0.99), weight_decay=0.01, fused=fused)
        ]
        if chosen:
            self.parts.append(torch.optim.Muon(chosen, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
        self.base = [[group["lr"] for group in part.param_groups] for part in self.parts]
        self.parameters = [*rest, *chosen]

    def step(self, factor: float) -> None:
        """Clip, step with every learning rate times `factor`, clear."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        for part, rates in zip(self.parts, self.base, strict=True):
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """State of all parts."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Inverse of `state_dict`."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


@dataclass
class Budget:
    """Stops after `minutes` or `steps`; the learning rate warms up, stays, and falls to zero over the last part."""

    minutes: float
    steps: int = 10**9
    warmup: int = 200
    cooldown: float = 0.4
    started: float = field(default_factory=time.monotonic)

    def progress(self, step: int) -> float:
        """The larger of the time and step fractions, in [0, 1]."""
        return min(1.0, max((time.monotonic() - self.started) / 60 / self.minutes, step / self.steps))

    def factor(self, step: int) -> float:
        """Learning-rate factor at a step of this run."""
        fall = min(1.0, (1.0 - self.progress(step)) / self.cooldown)
        return min(1.0, (step + 1) / self.warmup) * max(fall, 0.02)


class Log:
    """Appends one CSV row every `every` steps: step, seconds, loss (mean), lr factor, samples per second."""

    def __init__(self, path: Path, every: int = 50) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.every = path, every
        self.total: torch.Tensor | float = 0.0
        self.count = self.samples = 0
        self.offset = self._resume()
        self.started = self.since = time.monotonic()

    def _resume(self) -> float:
        if self.path.exists():
            rows = self.path.read_text().splitlines()
            return float(rows[-1].split(",")[1]) if len(rows) > 1 else 0.0
        self.path.write_text("step,seconds,loss,lr_factor,samples_per_second\n")
        return 0.0

    def add(self, step: int, loss: torch.Tensor, factor: float, samples: int) -> None:
        """Collect one step; writes when `every` steps are together (the only synchronisation with the GPU)."""
        self.total = self.total + loss.detach()
        self.count, self.samples = self.count + 1, self.samples + samples
        if self.count < self.every:
            return
        mean = float(self.total) / self.count
        now = time.monotonic()
        rate = self.samples / (now - self.since)
        row = [step, f"{self.offset + now - self.started:.1f}", f"{mean:.5f}", f"{factor:.3f}", f"{rate:.0f}"]
        with self.path.open("a", newline="") as handle:
            csv.writer(handle).writerow(row)
        print(self.path.stem, *row, flush=True)
        self.total, self.count, self.samples, self.since = 0.0, 0, 0, now


def save(path: Path, **parts: Any) -> None:
    """Write a checkpoint to a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(parts, temporary)
    temporary.rename(path)


def run(budget: Budget, step: int, one: Callable[[int, float], None], keep: Callable[[int], None]) -> int:
    """Call `one(step, lr_factor)` until the budget is spent, `keep(step)` every two minutes and at the end."""
    first, saved = step, time.monotonic()
    while budget.progress(step - first) < 1.0:
        one(step, budget.factor(step - first))
        step += 1
        if time.monotonic() - saved > 120:
            keep(step)
            saved = time.monotonic()
    keep(step)
    return step
