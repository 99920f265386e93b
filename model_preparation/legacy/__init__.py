"""Layers that older programs pickled as whole modules, read by a process that can do no harm."""
