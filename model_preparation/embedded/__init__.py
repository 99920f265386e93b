"""A trained pair that comes with the package, the language it was trained on, and the task that it is scored by.

`tiny_llama` is the donor and `tiny_llamba` the base made from it; `scripts/make_embedded_pair.py` made both, and their
cards say how. `embedded_recall` is the folder of lm-eval's task of the same name.
"""
