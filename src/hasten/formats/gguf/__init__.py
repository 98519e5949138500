"""GGUF, the file format of ggml, llama.cpp, stable-diffusion.cpp and ComfyUI-GGUF."""
