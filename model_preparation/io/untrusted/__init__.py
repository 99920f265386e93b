"""Checks files of strangers before they are used: JSON, configs, pickles, zip files and tokenizers."""
