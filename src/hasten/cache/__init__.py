"""Caches: reuse of intermediate results over denoising steps, without training."""

from hasten.cache.ada_cache import AdaCache
from hasten.cache.deep_cache import DeepCache
from hasten.cache.first_block import FirstBlockCache
from hasten.cache.fora import FORA
from hasten.cache.taylor_seer import TaylorSeer

__all__ = ["FORA", "AdaCache", "DeepCache", "FirstBlockCache", "TaylorSeer"]
