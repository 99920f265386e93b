"""The versions of this package and of the libraries that decide on what is written, as our JSON files record them."""

from importlib.metadata import version

__version__ = "0.2.0"

_LIBRARIES = ("torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """The version of this package and of the libraries that decide on what is written."""
    import torch  # its own attribute has the build's name too, such as +cpu

    installed = {name: version(name) for name in _LIBRARIES} | {"torch": torch.__version__}
    return {"model_preparation": __version__, **installed}
