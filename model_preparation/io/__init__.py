"""Bytes on the disk: files and folders that appear whole or not at all, blocks, digests, locks, text, progress."""
