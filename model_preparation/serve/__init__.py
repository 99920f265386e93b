"""Serving: a plugin that adds our models to vLLM, and the engines that serve_checkpoint.py starts."""
