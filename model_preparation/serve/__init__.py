"""Serving: a plugin that teaches vLLM our models, and the engines that serve_checkpoint.py starts."""
