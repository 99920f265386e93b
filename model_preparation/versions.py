"""The versions that our JSON files record: of the package and its libraries."""

from importlib.metadata import version

__version__ = "0.5.3"

_LIBRARIES = ("torch", "transformers", "safetensors")


def versions() -> dict[str, str]:
    """The version of this package, and of the libraries that decide the contents of our files."""
    import torch  # torch.__version__ also names the build, such as +cpu

    installed = {name: version(name) for name in _LIBRARIES} | {"torch": torch.__version__}
    return {"model_preparation": __version__, **installed}
