"""ONNX files that are as good as the models they are of."""
