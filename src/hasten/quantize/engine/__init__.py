"""What all quantizers do in the same way: find layers, put quantized ones in their places, and show that they ran."""
