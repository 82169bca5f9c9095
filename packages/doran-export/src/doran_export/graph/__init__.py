"""From a model to one ONNX file: inputs and outputs, tracing, precisions, storage, and the genai builder."""
