"""Export: ONNX files, the proof that they are the trained network, and the bundle that ships."""
