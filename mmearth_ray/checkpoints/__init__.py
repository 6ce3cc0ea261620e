"""Weights in and out: the exported model, and published checkpoints, timm names and ONNX to and from it."""
