"""ComfyUI's newer quantized files."""
