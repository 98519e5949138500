"""Architectures: what hasten knows about each denoiser, as data. A new one is a file and a line here."""

from __future__ import annotations

from hasten.denoisers.dit import DIT
from hasten.denoisers.flux import FLUX
from hasten.denoisers.pixart import PIXART
from hasten.denoisers.qwen_image import QWEN_IMAGE
from hasten.denoisers.sd3 import SD3
from hasten.denoisers.sdxl import SDXL
from hasten.denoisers.stable_diffusion import STABLE_DIFFUSION
from hasten.denoisers.wan import WAN
from hasten.denoisers.z_image import Z_IMAGE

__all__ = ["DIT", "FLUX", "PIXART", "QWEN_IMAGE", "SD3", "SDXL", "STABLE_DIFFUSION", "WAN", "Z_IMAGE"]
