"""Register a model that another tool fitted and exported as an ONNX graph."""
