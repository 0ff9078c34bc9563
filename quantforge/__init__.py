"""quantforge: convert any language-model checkpoint into any other, quantized as well as the science allows."""
