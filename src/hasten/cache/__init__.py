"""Caches: reuse of intermediate results over denoising steps, without training."""

from hasten.cache.ada_cache import AdaCache
from hasten.cache.db_cache import DBCache
from hasten.cache.deep_cache import DeepCache
from hasten.cache.first_block import FirstBlockCache
from hasten.cache.fora import FORA
from hasten.cache.skip_guidance import SkipGuidance
from hasten.cache.step_mask import StepMask
from hasten.cache.taylor_seer import TaylorSeer

__all__ = ["FORA", "AdaCache", "DBCache", "DeepCache", "FirstBlockCache", "SkipGuidance", "StepMask", "TaylorSeer"]
