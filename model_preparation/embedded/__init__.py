"""Two small trained models that come with the package, the language of their texts, and the task that scores them.

`tiny_llama` is the donor, `tiny_llamba` the base made from it. `scripts/make_embedded_pair.py` made both, and the
README.md of each says how. The folder `embedded_recall` is the task of this name, for lm-eval.
"""
