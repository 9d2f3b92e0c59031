"""Integer arithmetic: targets, fake-quantization, and the observers that choose ranges."""
