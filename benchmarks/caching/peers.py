"""The peers' own code at settings they recommend, brought to the same number of full steps.

Everything runs in a process of its own on a fresh pipeline (cache-dit patches pipeline classes), so nothing is undone.
Packages: benchmarks/requirements-peers.txt.
"""

from __future__ import annotations

import ast
import contextlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from methods import Draw, Method, Search, Setting, Values, exactly, intervals

# cache-dit's benchmark ladder goes from at most 4 to 10 reused steps in a row, after 4 full ones ("W4").
LADDER: tuple[Values, ...] = ({"most": 4}, {"most": 6}, {"most": 8}, {"most": 10}, {"most": -1})


@contextmanager
def cache_dit(
    pipeline: Any, setting: Setting, *, front: int = 1, back: int = 0, warm_up: int = 4, order: int = 0
) -> Iterator[None]:
    """DBCache of cache-dit, with its TaylorSeer calibrator if `order` is not 0."""
    options = {
        "residual_diff_threshold": setting.values["threshold"],
        "max_continuous_cached_steps": setting.values.get("most", -1),
        "max_warmup_steps": warm_up,
    }
    _enable_cache_dit(pipeline, setting, order, Fn_compute_blocks=front, Bn_compute_blocks=back, **options)
    yield


@contextmanager
def cache_dit_mask(pipeline: Any, setting: Setting, *, order: int) -> Iterator[None]:
    """cache-dit with a step computation mask (static policy): a warm-up, then full steps at even distances."""
    mask = step_mask(setting.steps, setting.budget)
    options = {"max_warmup_steps": 0, "steps_computation_mask": mask, "steps_computation_policy": "static"}
    _enable_cache_dit(pipeline, setting, order, Fn_compute_blocks=1, Bn_compute_blocks=0, **options)
    yield


def step_mask(steps: int, budget: int) -> list[int]:
    """1 = compute: the first steps (a third of the budget), the others evenly, the last one among them."""
    warm = max(1, budget // 3)
    rest = budget - warm
    places = {warm - 1 + round((place + 1) * (steps - warm) / rest) for place in range(rest)}
    return [int(step < warm or step in places) for step in range(steps)]


def _enable_cache_dit(pipeline: Any, setting: Setting, order: int, **options: Any) -> None:
    import cache_dit as package

    taylor = package.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    config = package.DBCacheConfig(num_inference_steps=setting.steps, **options)
    package.enable_cache(pipeline, cache_config=config, calibrator_config=taylor)


@contextmanager
def diffusers_cache(pipeline: Any, setting: Setting, *, make: Any) -> Iterator[None]:
    """A cache of diffusers' own, through `enable_cache` where the denoiser has it."""
    denoiser, config = _denoiser(pipeline), make(setting)
    if getattr(config, "use_lite_mode", False) and not hasattr(denoiser, "proj_out"):
        # It would leave out the blocks and, finding no such layer, guess nothing in their place.
        raise ValueError(f"the lite mode guesses the output of `proj_out`, which {type(denoiser).__name__} has not")
    denoiser.enable_cache(config) if hasattr(denoiser, "enable_cache") else _by_hand(denoiser, config)
    yield


def _by_hand(denoiser: Any, config: Any) -> None:
    """For models that diffusers does not equip: its public functions, a cache context around each call, and resets."""
    import torch
    from diffusers import hooks
    from diffusers.models.cache_utils import CacheMixin

    functions = {
        "FirstBlockCacheConfig": hooks.apply_first_block_cache,
        "TaylorSeerCacheConfig": hooks.apply_taylorseer_cache,
        "MagCacheConfig": hooks.apply_mag_cache,
    }
    functions[type(config).__name__](denoiser, config)
    registry, forward, last = hooks.HookRegistry.check_if_exists_or_initialize(denoiser), denoiser.forward, [0.0]

    def in_context(*args: Any, **kwargs: Any) -> Any:
        timestep = float(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).flatten()[0])
        if timestep > last[0]:  # a new picture: pipelines reset only the models that diffusers equips
            registry.reset_stateful_hooks()
        last[0] = timestep
        with CacheMixin.cache_context(denoiser, "both"):
            return forward(*args, **kwargs)

    denoiser.forward = in_context


def _denoiser(pipeline: Any) -> Any:
    return getattr(pipeline, "transformer", None) or pipeline.unet


def first_block(setting: Setting) -> Any:
    """diffusers' FirstBlockCache."""
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=setting.values["threshold"])


def taylor_seer(setting: Setting, *, lite: bool = False, modules: tuple[str, ...] | None = None) -> Any:
    """diffusers' TaylorSeer, order 1; factors in the run's own precision instead of bfloat16.

    `modules`: patterns of module names in place of its own, which find FLUX's attention and nothing in a DiT.
    """
    import torch
    from diffusers import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(
        cache_interval=setting.values["interval"],
        disable_cache_before_step=setting.values["before"],
        max_order=1,
        taylor_factors_dtype=torch.float32,
        use_lite_mode=lite,
        cache_identifiers=modules,
    )


def taylor_steps(steps: int) -> Iterator[tuple[Values, int]]:
    """Intervals with 3 leading full steps (the default), then with fewer, for budgets that 3 do not leave room for."""
    for before in (3, 2, 1):
        for interval in range(1, steps + 1):
            full = sum(step < before or (step - before - 1) % interval == 0 for step in range(steps))
            yield {"interval": interval, "before": before}, full


def mag_cache(setting: Setting) -> Any:
    """diffusers' MagCache with ratios measured here; the first tenth of the steps is full, as the paper has it."""
    from diffusers import MagCacheConfig

    return MagCacheConfig(
        threshold=setting.values["threshold"],
        max_skip_steps=setting.values["most"],
        retention_ratio=0.1,
        num_inference_steps=setting.steps,
        mag_ratios=setting.values["ratios"],
    )


def measure_ratios(pipeline: Any, steps: int, draw: Draw) -> Values:
    """The mean of the magnitude ratios that diffusers prints with `calibrate=True`, one list a picture."""
    from diffusers import MagCacheConfig

    config = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), diffusers_cache(pipeline, Setting(steps, steps), make=lambda _: config):
        draw(pipeline, steps)
    lists = [ast.literal_eval(line) for line in printed.getvalue().splitlines() if line.startswith("[1.0")]
    return {"ratios": [round(sum(column) / len(lists), 5) for column in zip(*lists, strict=True)]}


@contextmanager
def deep_cache(pipeline: Any, setting: Setting) -> Iterator[None]:
    """The DeepCache package, at its recommended branch 0."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipeline)
    helper.set_params(cache_interval=setting.values["interval"], cache_branch_id=0)
    helper.enable()
    yield


def peers() -> list[Method]:
    """The rows of the peers."""
    steep, mag = Search(ladder=LADDER), tuple({"most": most} for most in (3, 5, 8, 50))
    return [
        Method("cache-dit DBCache F1B0 W0", "peer", partial(cache_dit, warm_up=0), Search()),
        Method("cache-dit DBCache F1B0 W4", "peer", cache_dit, steep),
        Method("cache-dit DBCache F2B1 W4", "peer", partial(cache_dit, front=2, back=1), steep),
        Method("cache-dit DBCache F1B0 W4 + TaylorSeer O1", "peer", partial(cache_dit, order=1), steep),
        Method("cache-dit step mask + TaylorSeer O1", "peer", partial(cache_dit_mask, order=1), exactly),
        Method("diffusers FirstBlockCache", "peer", partial(diffusers_cache, make=first_block), Search()),
        Method("diffusers TaylorSeer", "peer", _taylor(), taylor_steps),
        Method(
            "diffusers TaylorSeer, attn1 and ff named",
            "peer",
            _taylor(modules=(r"transformer_blocks\.\d+\.(attn1|ff)",)),
            taylor_steps,
            models=("emoji-dit",),
        ),
        Method("diffusers TaylorSeer lite", "peer", _taylor(lite=True), taylor_steps),
        Method(
            "diffusers MagCache",
            "peer",
            partial(diffusers_cache, make=mag_cache),
            Search(ladder=mag),
            calibrate=measure_ratios,
        ),
        Method("DeepCache package", "peer", deep_cache, intervals),
    ]


def _taylor(**options: Any) -> Any:
    return partial(diffusers_cache, make=partial(taylor_seer, **options))
