"""Training: a Llama's layers distilled into the mixers of a Llamba."""
