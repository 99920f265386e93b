"""Tensors in files: where they lie, and files of them written without loading them."""
