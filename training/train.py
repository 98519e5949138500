"""Train one denoiser (with its text encoders) on the latents of the trained autoencoder, or distil FLUX's guidance."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from loop import Budget, Ema, Log, Optimisers, run, save
from tasks import FluxTask, Task, make_task
from torch.nn import functional as F


def parse() -> argparse.Namespace:
    """Command line: see README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["emoji-flux", "emoji-sd", "emoji-dit"])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, help="folder that holds vae/; checkpoints and logs go there too")
    parser.add_argument("tokenizers", type=Path)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, default=1.0, help="factor on the learning rates")
    parser.add_argument("--distil", action="store_true", help="emoji-flux: distil guidance into the trained model")
    parser.add_argument("--refine", action="store_true", help="go on with a trained model: flat areas, true colours")
    parser.add_argument("--eager", action="store_true", help="no torch.compile")
    return parser.parse_args()


def start(task: Task, ema: Ema, optimiser: Optimisers, folder: Path, name: str) -> int:
    """Resume from the full checkpoint, else from the small EMA file, else from nothing; returns the step."""
    full, small = folder / f"{name}.pt", folder / f"{name}.ema.pt"
    for path in (full, small):
        if not path.exists():
            continue
        state = torch.load(path, map_location=task.data.device, weights_only=True)
        shadow = {key: state["ema"][key].float() for key in ema.shadow}  # in the order of the parameters
        task.load_state_dict(state.get("model", shadow), strict=False)
        ema.shadow, ema.updates = shadow, state["step"]
        if "optimiser" in state:
            optimiser.load_state_dict(state["optimiser"])
        print(f"{name}: resumed {path.name} at step {state['step']}", flush=True)
        return int(state["step"])
    return 0


def keeper(task: Task, ema: Ema, optimiser: Optimisers, folder: Path, name: str) -> Any:
    """A function that writes the full checkpoint and the small one (EMA in half precision)."""

    def keep(step: int) -> None:
        save(
            folder / f"{name}.pt", model=task.state_dict(), ema=ema.shadow, optimiser=optimiser.state_dict(), step=step
        )
        save(folder / f"{name}.ema.pt", ema={k: v.half() for k, v in ema.shadow.items()}, step=step)

    return keep


def train(args: argparse.Namespace, task: Task, device: str) -> None:
    """The training loop of one model."""
    optimiser = Optimisers(task, task.lr * args.lr, task.muon(), task.muon_lr * args.lr)
    ema = Ema(task, 0.998 if args.refine else 0.9995)
    step = start(task, ema, optimiser, args.out, args.model)
    log = Log(args.out / "logs" / f"{args.model}.csv")
    torch.manual_seed(step)

    def one(step: int, factor: float) -> None:
        batch = torch.randint(len(task.data), (args.batch,), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = task.loss(batch)
        loss.backward()
        optimiser.step(factor)
        ema.update()
        log.add(step, loss, factor, args.batch)

    budget = Budget(args.minutes, args.steps, cooldown=0.8 if args.refine else 0.4)
    run(budget, step, one, keeper(task, ema, optimiser, args.out, args.model))


class Distillation:
    """Student(x, w) learns teacher's uncond + w (cond - uncond), w uniform in [1, 6] (arXiv 2210.03142, stage one)."""

    def __init__(self, task: FluxTask) -> None:
        import copy

        self.task = task
        self.teacher: Any = copy.deepcopy(task.transformer).requires_grad_(False)
        self.quick: Any = self.teacher
        task.text_encoder.requires_grad_(False)
        task.text_encoder_2.requires_grad_(False)

    def compile(self) -> None:
        """Compile teacher and student."""
        self.quick = torch.compile(self.teacher, dynamic=False)
        self.task.compile()

    @torch.no_grad()
    def target(self, x: torch.Tensor, t: torch.Tensor, w: torch.Tensor, texts: Any, empty: Any) -> torch.Tensor:
        """The guided velocity; conditional and unconditional go through the teacher as one batch."""
        states, pooled = (torch.cat(pair) for pair in zip(texts, empty, strict=True))
        task, kept = self.task, (self.task.fast, self.task.transformer)
        task.fast = self.quick
        both = task.predict(torch.cat([x, x]), torch.cat([t, t]), torch.ones_like(torch.cat([t, t])), states, pooled)
        task.fast = kept[0]
        conditional, unconditional = both.float().chunk(2)
        return unconditional + w[:, None, None] * (conditional - unconditional)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        """Distillation loss; the teacher sees 16 text tokens, the student any length."""
        task = self.task
        length = task.length()
        if length > 64:
            batch = batch[: len(batch) // 2]
        x, t, _ = task.noised(batch)
        w = 1 + 5 * torch.rand_like(t)
        with torch.no_grad():
            state = torch.get_rng_state(), torch.cuda.get_rng_state() if x.is_cuda else None
            texts = task.texts(batch, 16)
            torch.set_rng_state(state[0])
            if state[1] is not None:
                torch.cuda.set_rng_state(state[1])
            long = texts if length == 16 else task.texts(batch, length)
            empty = task.texts(torch.full_like(batch, len(task.data)), 16)
        target = self.target(x, t, w, texts, empty)
        return F.mse_loss(task.predict(x, t, w, *long).float(), target)


def distil(args: argparse.Namespace, task: FluxTask, device: str) -> None:
    """Distil guidance; starts from the EMA of the trained model, continues its own checkpoint if there is one."""
    trained = torch.load(args.out / "emoji-flux.ema.pt", map_location=device, weights_only=True)["ema"]
    task.load_state_dict({key: value.float() for key, value in trained.items()}, strict=False)
    distillation = Distillation(task)
    if not args.eager:
        distillation.compile()
    optimiser = Optimisers(task.transformer, 5e-4 * args.lr, task.muon(), 5e-4 * args.lr)
    ema = Ema(task, 0.998)
    name = "emoji-flux-distilled"
    step = start(task, ema, optimiser, args.out, name)
    log = Log(args.out / "logs" / f"{name}.csv")
    torch.manual_seed(1000 + step)

    def one(step: int, factor: float) -> None:
        batch = torch.randint(len(task.data), (args.batch,), device=device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = distillation.loss(batch)
        loss.backward()
        optimiser.step(factor)
        ema.update()
        log.add(step, loss, factor, args.batch)

    run(Budget(args.minutes, args.steps, warmup=100), step, one, keeper(task, ema, optimiser, args.out, name))


def main() -> None:
    """Set up and dispatch."""
    args = parse()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward fails on these shapes (torch 2.11, CUDA 13)
    torch._dynamo.config.suppress_errors = True  # eager where the compiler fails
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = make_task(args.model, args.data, args.out / "vae", args.tokenizers, device)
    if args.refine:
        task.refine()
    if args.distil:
        assert isinstance(task, FluxTask)
        distil(args, task, device)
        return
    if not args.eager:
        task.compile()
    train(args, task, device)


if __name__ == "__main__":
    main()
