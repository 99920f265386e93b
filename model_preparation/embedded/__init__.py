"""A trained pair that comes with the package, its language, and the task that scores it.

`tiny_llama` is the donor, `tiny_llamba` the base made from it. `scripts/make_embedded_pair.py` made both; their cards
say how. `embedded_recall` is the folder of the task with this name, for lm-eval.
"""
