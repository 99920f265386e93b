"""Files on the disk: files and folders that appear whole or not at all, digests, locks, text, progress bars."""
