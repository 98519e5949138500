"""The three architectures and their shared autoencoder; every number that fixes a file size is here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    UNet2DConditionModel,
)
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

LATENT_SIZE = 32  # 128 px / 4
NULL_CLASS = 1000  # hard-coded by DiTPipeline


def make_vae(channels: int = 4) -> AutoencoderKL:
    """128x128 RGB <-> [channels, 32, 32]; no attention, so it also works at other sizes."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 40, 48),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
        force_upcast=False,
    )


def make_clip(vocabulary: int, bos: int, eos: int, width: int, layers: int) -> CLIPTextModel:
    """A small CLIP text encoder; `eos` is where the pooled vector is read."""
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
        projection_dim=width,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return CLIPTextModel(config)


def make_t5(vocabulary: int, width: int = 96, layers: int = 2) -> T5EncoderModel:
    """A small T5 encoder with gated GELU, as T5 v1.1."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=32,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=width // 32,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def make_flux(channels: int, text_width: int, pooled_width: int) -> FluxTransformer2DModel:
    """3 double + 6 single stream blocks of width 128 over 16x16 packed latents."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * channels,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=text_width,
        pooled_projection_dim=pooled_width,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )


def make_unet(channels: int, text_width: int) -> UNet2DConditionModel:
    """Three resolutions (32, 16, 8); cross-attention on the lower two (1,024 tokens cost too much)."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(48, 64, 80),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=16,
        transformer_layers_per_block=1,
    )


def make_dit(channels: int) -> DiTTransformer2DModel:
    """8 blocks of width 96, patch 2; the 1001-row class table sits in every block."""
    return DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        num_layers=8,
        attention_bias=True,
        sample_size=LATENT_SIZE,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """FLUX.1-dev's scheduler: the shift grows with the number of image tokens (e^0.5 at 256)."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        shift=3.0,
    )


def ddim_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR and trailing steps (arXiv 2305.08891), so that white comes out white."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def load_tokenizer(folder: Path) -> Any:
    """A tokenizer written by text.py."""
    return AutoTokenizer.from_pretrained(folder)
