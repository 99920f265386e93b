"""The gate for strangers' files: JSON, configs, pickles, zip files and tokenizers are checked before use."""
