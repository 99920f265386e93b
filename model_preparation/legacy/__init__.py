"""Layers that older programs pickled as whole modules, read by a separate process that can do no harm."""
