"""What strangers made, looked through before anything is made of it: JSON, configs, pickles, zip files, tokenizers."""
