"""The model's own source files, of which every checkpoint of format hf carries a copy.

In: what a checkpoint's checkpoint_info.json lists. Out: this package's files, and whether those listed are the same.
Imports neither torch nor transformers.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from model_preparation.checkpoint.checkpoint_info import INFO, read_info
from model_preparation.io.digests import describe_file, describe_files
from model_preparation.versions import __version__

CODE_UPDATES = "code_updates"  # in checkpoint_info.json: when the code was changed after the build, and how
AUTO_MAP = {  # in config.json: what transformers takes from the files
    "AutoConfig": "configuration_llamba.LlambaConfig",
    "AutoModel": "modeling_llamba.LlambaModel",
    "AutoModelForCausalLM": "modeling_llamba.LlambaForCausalLM",
}


_MAIN = "modeling_llamba.py"
_PACKAGE = Path(__file__).resolve().parents[1]
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)  # as transformers finds them


def package_code() -> dict[str, Path]:
    """This package's files by name: the model's, and those that it imports relatively."""
    found: dict[str, Path] = {}
    waiting = [_MAIN]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = _PACKAGE / "llamba" / name
            waiting += [f"{other}.py" for other in _RELATIVE_IMPORT.findall(found[name].read_text(encoding="utf-8"))]
    return dict(sorted(found.items()))


def code_digests() -> dict[str, str]:
    """SHA-256 of each source file that goes into checkpoints' folders, by name; and of the whole package's code."""
    whole = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        whole.update(f"{path.relative_to(_PACKAGE).as_posix()}\0{_sha256(path)}\n".encode())
    return {"package": whole.hexdigest(), **{name: _sha256(path) for name, path in sorted(package_code().items())}}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def describe_package_code() -> dict[str, dict]:
    """{"bytes", "sha256"} of this package's files by name."""
    return {name: describe_file(path) for name, path in package_code().items()}


def listed_code(info: Mapping[str, Any]) -> dict[str, dict]:
    """{"bytes", "sha256"} of the code that a checkpoint_info.json lists, by name; a folder of format pt has none."""
    return {name: entry for name, entry in info["files"].items() if name.endswith(".py") and "/" not in name}


def code_in(directory: Path) -> dict[str, dict]:
    """{"bytes", "sha256"} of the code in a folder, by name: as it lists them, or as they are where it lists nothing."""
    if (directory / INFO).is_file():
        return listed_code(read_info(directory))
    return describe_files(directory, "*.py")


def has_code(directory: Path) -> bool:
    """Whether a folder carries the model's code."""
    return (directory / _MAIN).is_file()


def differing_code(listed: Mapping[str, dict]) -> list[str]:
    """The names of files that are not this package's, or that only one of the two has."""
    ours = describe_package_code()
    return sorted(name for name in listed.keys() | ours.keys() if listed.get(name) != ours.get(name))


def remark_on_code(directory: Path, listed: Mapping[str, dict]) -> str | None:
    """What to say of a folder whose code is not this package's; None if it is, or if it has no code of ours."""
    if not listed or not has_code(directory) or not (odd := differing_code(listed)):
        return None
    return (
        f"The model's code in {directory} is not that of this model_preparation ({', '.join(odd)}). "
        f"To put that in: python update_checkpoint.py {directory}"
    )


def is_newer(info: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's code is of a newer version of this package."""
    try:
        made_by = (info.get(CODE_UPDATES) or [info["versions"]])[-1]["model_preparation"]
        return Version(made_by) > Version(__version__)
    except (LookupError, TypeError, InvalidVersion):  # not what we write, so it tells nothing
        return False
