"""What caches must reproduce, written out by hand: shallow U-Net runs, and transformers with known branch outputs."""

from __future__ import annotations

from typing import Any

import torch
from cache_harness import Arguments, Pipe
from torch import nn

from hasten.cache.engine.deep_feature import Cut


def residuals(pipe: Pipe, given: Arguments, seed: int) -> Arguments:
    """What a ControlNet adds: one residual for each skip connection, and one for the middle."""
    shapes: list[torch.Size] = []
    hook = pipe.model.conv_in.register_forward_hook(lambda *call: shapes.append(call[2].shape))
    hooks = [
        d.register_forward_hook(lambda *call: shapes.extend(o.shape for o in call[2][1]))
        for d in pipe.model.down_blocks
    ]
    with torch.no_grad():
        pipe.model(**given)
    for handle in (hook, *hooks):
        handle.remove()
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator) for shape in (*shapes, shapes[-1])]
    return {"down_block_additional_residuals": tuple(made[:-1]), "mid_block_additional_residual": made[-1]}


def shallow(model: Any, cut: Cut, given: Arguments, feature: torch.Tensor) -> torch.Tensor:
    """The outer part of a U-Net, written out by hand from the paper."""
    emb = model.time_embedding(model.get_time_embed(sample=given["sample"], timestep=given["timestep"]))
    text = given["encoder_hidden_states"]
    hidden = model.conv_in(given["sample"])
    skips = [hidden]
    for stage in model.down_blocks[: cut.stage + 1]:
        inner = stage is model.down_blocks[cut.stage]
        for i, resnet in enumerate(stage.resnets[: cut.layers if inner else None]):
            hidden = layer(stage, i, resnet, hidden, emb, text)
            skips.append(hidden)
        if not inner:
            hidden = stage.downsamplers[0](hidden)
            skips.append(hidden)
    added = given.get("down_block_additional_residuals", ())
    skips = [skip + extra for skip, extra in zip(skips, added, strict=False)] if added else skips
    return ascend(model, cut, skips, feature, emb, text)


def ascend(
    model: Any, cut: Cut, skips: list[torch.Tensor], hidden: torch.Tensor, emb: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    for distance in range(cut.stage, -1, -1):
        stage = model.up_blocks[len(model.up_blocks) - 1 - distance]
        first = len(stage.resnets) - 1 - cut.layers if distance == cut.stage else 0
        for i in range(first, len(stage.resnets)):
            hidden = torch.cat([hidden, skips.pop()], dim=1)
            hidden = layer(stage, i, stage.resnets[i], hidden, emb, text)
        if stage.upsamplers is not None:
            hidden = stage.upsamplers[0](hidden, skips[-1].shape[2:])
    return model.conv_out(model.conv_act(model.conv_norm_out(hidden)))


def layer(
    stage: Any, index: int, resnet: Any, hidden: torch.Tensor, emb: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    hidden = resnet(hidden, emb)
    if hasattr(stage, "attentions"):
        hidden = stage.attentions[index](hidden, encoder_hidden_states=text, return_dict=False)[0]
    return hidden


def deep_feature(model: Any, cut: Cut, given: Arguments) -> torch.Tensor:
    """The input of the first up layer that a shallow run computes, without the skip connection joined to it."""
    stage = model.up_blocks[len(model.up_blocks) - 1 - cut.stage]
    resnet = stage.resnets[len(stage.resnets) - 1 - cut.layers]
    in_order = [model.mid_block.resnets[-1], *(r for up in model.up_blocks for r in up.resnets)]
    seen: list[torch.Tensor] = []
    handle = resnet.register_forward_hook(lambda *call: seen.append(call[1][0]))
    model(**given)
    handle.remove()
    return seen[0][:, : in_order[in_order.index(resnet) - 1].out_channels]


def branch_outputs(model: Any, names: tuple[str, ...], given: Arguments) -> dict[str, Any]:
    """What each branch puts out in a complete call, by path."""
    found: dict[str, Any] = {}
    handles = [
        part.register_forward_hook(lambda *call, path=path: found.setdefault(path, call[2]))
        for path, part in model.named_modules()
        if path.count(".") == 2 and path.rpartition(".")[2] in names
    ]
    model(**given)
    for handle in handles:
        handle.remove()
    return found


def dit_by_hand(model: Any, given: Arguments, known: dict[str, Any]) -> torch.Tensor:
    """DiT with fresh gates, and everything before the gates as known."""
    hidden = model.pos_embed(given["hidden_states"])
    time, label = given["timestep"], given["class_labels"]
    for i, block in enumerate(model.transformer_blocks):
        _, gate_attention, _, _, gate_mlp = block.norm1(hidden, time, label, hidden_dtype=hidden.dtype)
        hidden = gate_attention.unsqueeze(1) * known[f"transformer_blocks.{i}.attn1"] + hidden
        hidden = gate_mlp.unsqueeze(1) * known[f"transformer_blocks.{i}.ff"] + hidden
    emb = model.transformer_blocks[0].norm1.emb(time, label, hidden_dtype=hidden.dtype)
    shift, scale = model.proj_out_1(nn.functional.silu(emb)).chunk(2, dim=1)
    hidden = model.proj_out_2(model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
    side, patch = int(hidden.shape[1] ** 0.5), model.patch_size
    hidden = hidden.reshape(-1, side, side, patch, patch, model.out_channels).permute(0, 5, 1, 3, 2, 4)
    return hidden.reshape(-1, model.out_channels, side * patch, side * patch)


def flux_by_hand(model: Any, given: Arguments, known: dict[str, Any]) -> torch.Tensor:
    """FLUX with fresh gates, and everything before the gates as known."""
    hidden, text = model.x_embedder(given["hidden_states"]), model.context_embedder(given["encoder_hidden_states"])
    emb = model.time_text_embed(given["timestep"] * 1000, given["guidance"] * 1000, given["pooled_projections"])
    for i, block in enumerate(model.transformer_blocks):
        at = f"transformer_blocks.{i}"
        _, gate, _, _, gate_mlp = block.norm1(hidden, emb=emb)
        _, text_gate, _, _, text_gate_mlp = block.norm1_context(text, emb=emb)
        image, context = known[f"{at}.attn"]
        hidden = hidden + gate.unsqueeze(1) * image
        hidden = hidden + gate_mlp.unsqueeze(1) * known[f"{at}.ff"]
        text = text + text_gate.unsqueeze(1) * context
        text = text + text_gate_mlp.unsqueeze(1) * known[f"{at}.ff_context"]
    tokens = text.shape[1]
    joined = torch.cat([text, hidden], dim=1)
    for i, block in enumerate(model.single_transformer_blocks):
        _, gate = block.norm(joined, emb=emb)
        joined = joined + gate.unsqueeze(1) * known[f"single_transformer_blocks.{i}.proj_out"]
    return model.proj_out(model.norm_out(joined[:, tokens:], emb))
