"""Bytes: files and folders written whole or not at all, read and written in blocks, known by their digests."""
