"""From a model to one ONNX file: what goes into the graph, tracing, precisions, storage, and the genai builder."""
