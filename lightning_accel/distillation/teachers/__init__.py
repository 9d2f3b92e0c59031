"""Teachers: a frozen module, an ensemble, an ONNX file, a Hugging Face model, or an average of the student."""
