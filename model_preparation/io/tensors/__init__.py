"""Finds where tensors lie in files, and writes .pt and safetensors files without loading whole models."""
