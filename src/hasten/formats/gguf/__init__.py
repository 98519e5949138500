"""GGUF, the file format of ggml, llama.cpp, stable-diffusion.cpp and ComfyUI-GGUF."""

from hasten.formats.gguf.gguf_format import GGUFFormat

__all__ = ["GGUFFormat"]
