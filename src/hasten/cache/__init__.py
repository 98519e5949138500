"""Caches: reuse of intermediate results over denoising steps, without training."""

from hasten.cache.deep_cache import DeepCache
from hasten.cache.first_block import FirstBlockCache
from hasten.cache.fora import FORA
from hasten.cache.mag_cache import MagCache
from hasten.cache.sea_cache import SeaCache
from hasten.cache.tea_cache import TeaCache

__all__ = ["FORA", "DeepCache", "FirstBlockCache", "MagCache", "SeaCache", "TeaCache"]
