"""ONNX Runtime: sessions, execution providers, and the runner that users call."""
