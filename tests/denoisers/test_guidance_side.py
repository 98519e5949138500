"""Which half of a guided batch, or which call of a step, follows the prompt: held against diffusers' own pipelines."""

from __future__ import annotations

from typing import Any

import diffusers as library
import pytest
import torch

from hasten.core.registry import specs

diffusers: Any = library  # its annotations exclude pipelines without text encoders, which run well
TOKENS = 6
CALL: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"}
PROMPT, NEGATIVE = 1.0, -1.0


class Seen(Exception):
    """Ends a pipeline once enough calls were seen."""


def text(width: int, value: float, *, tokens: int | None = TOKENS) -> torch.Tensor:
    return torch.full((1, tokens, width) if tokens else (1, width), value)


def conditionings(pipe: Any, model: Any, name: str, calls: int, **given: Any) -> list[Any]:
    """What the first calls of the denoiser are given as text, in order."""
    seen: list[Any] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs[name] if name in kwargs else args[2])
        if len(seen) == calls:
            raise Seen

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(Seen):
        pipe(**(CALL | given))
    handle.remove()
    return seen


def stable_diffusion(model: Any) -> list[float]:
    pipe: Any = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=model, scheduler=diffusers.DDIMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    embeds = {"prompt_embeds": text(32, PROMPT), "negative_prompt_embeds": text(32, NEGATIVE)}
    return signs(conditionings(pipe, model, "encoder_hidden_states", 1, **embeds))


def sdxl(model: Any) -> list[float]:
    pipe: Any = diffusers.StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=model,
        scheduler=diffusers.DDIMScheduler(), add_watermarker=False,
    )  # fmt: skip
    embeds = {"prompt_embeds": text(32, PROMPT), "negative_prompt_embeds": text(32, NEGATIVE)}
    embeds |= {"pooled_prompt_embeds": text(32, PROMPT, tokens=None)}
    embeds |= {"negative_pooled_prompt_embeds": text(32, NEGATIVE, tokens=None)}
    return signs(conditionings(pipe, model, "encoder_hidden_states", 1, **embeds))


def pixart(model: Any) -> list[float]:
    pipe: Any = diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=model, scheduler=diffusers.DDIMScheduler()
    )
    embeds = {"prompt_embeds": text(16, PROMPT), "negative_prompt_embeds": text(16, NEGATIVE)}
    embeds |= dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(1, TOKENS))
    size = {"height": 128, "width": 128, "use_resolution_binning": False, "negative_prompt": None}
    return signs(conditionings(pipe, model, "encoder_hidden_states", 1, **embeds, **size))


def sd3(model: Any) -> list[float]:
    pipe: Any = diffusers.StableDiffusion3Pipeline(
        transformer=model, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    embeds = {"prompt_embeds": text(16, PROMPT), "negative_prompt_embeds": text(16, NEGATIVE)}
    embeds |= {"pooled_prompt_embeds": text(16, PROMPT, tokens=None)}
    embeds |= {"negative_pooled_prompt_embeds": text(16, NEGATIVE, tokens=None)}
    return signs(conditionings(pipe, model, "encoder_hidden_states", 1, **embeds))


def z_image(model: Any) -> list[float]:
    pipe: Any = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=model,
    )  # fmt: skip
    embeds = {"prompt_embeds": [text(16, PROMPT)[0]], "negative_prompt_embeds": [text(16, NEGATIVE)[0]]}
    return signs(conditionings(pipe, model, "cap_feats", 1, height=128, width=128, **embeds))


def dit(model: Any) -> list[float]:
    pipe: Any = diffusers.DiTPipeline(transformer=model, vae=_Vae(), scheduler=diffusers.DDIMScheduler())
    (labels,) = conditionings(pipe, model, "class_labels", 1, class_labels=[3], output_type="np")
    none = 1000
    return [NEGATIVE if int(label) == none else PROMPT for label in labels]


class _Vae(torch.nn.Module):
    config = {"scaling_factor": 1.0}
    device, dtype = torch.device("cpu"), torch.float32


def qwen_image(model: Any) -> list[float]:
    pipe: Any = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        transformer=model,
    )  # fmt: skip
    embeds = {"prompt_embeds": text(32, PROMPT), "negative_prompt_embeds": text(32, NEGATIVE)}
    embeds |= dict.fromkeys(("prompt_embeds_mask", "negative_prompt_embeds_mask"), torch.ones(1, TOKENS).long())
    size = {"height": 128, "width": 128, "true_cfg_scale": 3.0}
    return signs(conditionings(pipe, model, "encoder_hidden_states", 2, **embeds, **size))


def wan(model: Any) -> list[float]:
    pipe: Any = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=model,
    )  # fmt: skip
    embeds = {"prompt_embeds": text(16, PROMPT), "negative_prompt_embeds": text(16, NEGATIVE)}
    size = {"height": 64, "width": 64, "num_frames": 1}
    return signs(conditionings(pipe, model, "encoder_hidden_states", 2, **embeds, **size))


def signs(conditioned: list[Any]) -> list[float]:
    """1 for what follows the prompt, -1 for what does not, in the order of batch or calls."""
    return [float(one.flatten()[0]) for given in conditioned for one in given]


PIPELINES = {f.__name__: f for f in (stable_diffusion, sdxl, pixart, sd3, z_image, dit, qwen_image, wan)}


def test_every_guided_architecture_is_here() -> None:
    assert set(PIPELINES) == {name for name, spec in specs().items() if spec.guidance in ("batched", "separate")}


@pytest.mark.parametrize("architecture", PIPELINES)
def test_the_conditional_side_is_that_of_diffusers_pipeline(architecture: str) -> None:
    spec = specs()[architecture]
    found = PIPELINES[architecture](spec.build_tiny())
    assert found == ([PROMPT, NEGATIVE] if spec.conditional == "first" else [NEGATIVE, PROMPT])
