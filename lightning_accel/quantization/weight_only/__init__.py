"""Weight-only quantization: integers with a scale for each group of inputs, activations in float."""
