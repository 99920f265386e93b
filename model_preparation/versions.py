"""The programs that decide on what is written: this package, its code, and the libraries it builds on.

In: nothing. Out: versions by name, and digests of our own source files, as they stand in the JSON files that we write.
So a file that differs can be told from a model that differs.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path

__version__ = "0.2.0"

_LIBRARIES = ("torch", "transformers", "safetensors")
_PACKAGE = Path(__file__).parent


def versions() -> dict[str, str]:
    """The version of this package and of the libraries that decide on what is written."""
    import torch  # its own attribute has the build's name too, such as +cpu

    installed = {name: version(name) for name in _LIBRARIES} | {"torch": torch.__version__}
    return {"model_preparation": __version__, **installed}


def code_digests() -> dict[str, str]:
    """SHA-256 of each source file that goes into checkpoints' folders, by name; and of the whole package's code."""
    from model_preparation.surgery.model_code import package_code

    whole = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        whole.update(f"{path.relative_to(_PACKAGE).as_posix()}\0{_sha256(path)}\n".encode())
    return {"package": whole.hexdigest(), **{name: _sha256(path) for name, path in sorted(package_code().items())}}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
