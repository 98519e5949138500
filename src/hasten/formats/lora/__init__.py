"""Adapters (LoRA) in safetensors files: diffusers' and PEFT's names, kohya's, and those of original repositories."""

from hasten.formats.lora.file import AdapterFile, LayerPart, read_adapter
from hasten.formats.lora.names import Names, Place
from hasten.formats.lora.writing import save_adapter

__all__ = ["AdapterFile", "LayerPart", "Names", "Place", "read_adapter", "save_adapter"]
