"""What is trained where a model has been quantized: adapters beside frozen codes, or weights that are rounded."""
