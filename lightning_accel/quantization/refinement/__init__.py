"""Steps after calibration that bring the quantized network nearer to the float one, without training."""
