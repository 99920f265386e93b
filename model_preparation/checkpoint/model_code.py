"""The model's own source files. Every checkpoint of format hf has a copy of them; `update_code` updates the copy.

This module imports neither torch nor transformers.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from model_preparation.checkpoint.checkpoint_info import EVALUATIONS, INFO, README, formats_of, read_info
from model_preparation.checkpoint.readme import readme_text
from model_preparation.creation_time import creation_time
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_folder import new_folder, remove_abandoned
from model_preparation.io.digests import describe_file, describe_files, sha256_of
from model_preparation.io.folder_lock import is_partial, take
from model_preparation.io.linked_files import share_file
from model_preparation.io.self_checksum import with_checksum
from model_preparation.io.untrusted.untrusted_files import read_json, regular_file
from model_preparation.versions import __version__

CODE_UPDATES = "code_updates"  # in checkpoint_info.json: the updates of the code after the build
AUTO_MAP = {  # in config.json: the classes that transformers takes from the files
    "AutoConfig": "configuration_llamba.LlambaConfig",
    "AutoModel": "modeling_llamba.LlambaModel",
    "AutoModelForCausalLM": "modeling_llamba.LlambaForCausalLM",
}

_CONFIG = "config.json"
_MAIN = "modeling_llamba.py"
_PACKAGE = Path(__file__).resolve().parents[1]
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)  # transformers has the same pattern


def package_code() -> dict[str, Path]:
    """The model's source files in this package, by name: the main file, and all that it needs by relative imports."""
    found: dict[str, Path] = {}
    waiting = [_MAIN]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = _PACKAGE / "llamba" / name
            waiting += [f"{other}.py" for other in _RELATIVE_IMPORT.findall(found[name].read_text(encoding="utf-8"))]
    return dict(sorted(found.items()))


def code_digests() -> dict[str, str]:
    """SHA-256 of each of the model's source files, by name, and of the whole package's code."""
    whole = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        whole.update(f"{path.relative_to(_PACKAGE).as_posix()}\0{sha256_of(path)}\n".encode())
    return {"package": whole.hexdigest(), **{name: sha256_of(path) for name, path in sorted(package_code().items())}}


def describe_package_code() -> dict[str, dict]:
    """{"bytes", "sha256"} of the files in `package_code`, by name."""
    return {name: describe_file(path) for name, path in package_code().items()}


def listed_code(info: Mapping[str, Any]) -> dict[str, dict]:
    """{"bytes", "sha256"} of the code that a checkpoint_info.json lists, by name. Format pt lists no code."""
    return {name: entry for name, entry in info["files"].items() if name.endswith(".py") and "/" not in name}


def code_in(directory: Path) -> dict[str, dict]:
    """{"bytes", "sha256"} of the code in a folder, by name; taken from checkpoint_info.json, if there is one."""
    if (directory / INFO).is_file():
        return listed_code(read_info(directory))
    return describe_files(directory, "*.py")


def has_code(directory: Path) -> bool:
    """Whether a folder has the model's code."""
    return (directory / _MAIN).is_file()


def differing_code(listed: Mapping[str, dict]) -> list[str]:
    """The names of code files that differ from this package's, or that are missing in one of the two."""
    ours = describe_package_code()
    return sorted(name for name in listed.keys() | ours.keys() if listed.get(name) != ours.get(name))


def remark_on_code(directory: Path, listed: Mapping[str, dict]) -> str | None:
    """A sentence for the user if a folder's model code differs from this package's; else None."""
    if not listed or not has_code(directory) or not (differing := differing_code(listed)):
        return None
    return (
        f"The model's code in {directory} differs from this model_preparation's ({', '.join(differing)}). "
        f"To copy this package's code there: python update_checkpoint.py {directory}"
    )


def is_newer(info: Mapping[str, Any]) -> bool:
    """Whether a newer version of this package wrote a checkpoint's code."""
    try:
        made_by = (info.get(CODE_UPDATES) or [info["versions"]])[-1]["model_preparation"]
        return Version(made_by) > Version(__version__)
    except (LookupError, TypeError, InvalidVersion):  # another program wrote this
        return False


def update_code(directory: str | Path) -> list[str]:
    """Copy this package's model code into a checkpoint's folder; the weights stay the same files.

    A new folder with links to the old files is made. Then it replaces the old folder in one step.

    Args:
        directory: a folder written by `build_checkpoint` with format "hf" or "both".

    Returns:
        The names of the code files that changed; an empty list if the folder has this package's code already, or needs
            no code.

    Raises:
        SurgeryError: if `directory` is no checkpoint; if a file in it has changed since it was written; if a newer
            version of this package wrote its code; or if another process is writing there.
        OSError: from the file system; then the folder has not changed.
    """
    from model_preparation.checkpoint.verify import verify  # verify.py imports this module

    directory = Path(directory).expanduser()
    if (folder := directory.resolve()).parent.is_dir():
        remove_abandoned(folder.parent, only_for=folder)  # a killed run may have left this folder in NAME.partial
    if has_code(directory) and not (directory / INFO).exists():
        raise SurgeryError(
            f"{directory} has no {INFO} (save_pretrained writes none), so its files cannot be checked. "
            "Import model_preparation, load the model by from_pretrained, and save it into a new folder, which gets "
            "this package's code."
        )
    info = read_info(directory)
    changed = differing_code(listed_code(info))
    if "hf" not in formats_of(info) or not changed:
        return []
    if is_newer(info):
        raise SurgeryError(
            f"{directory} has the model's code of a newer model_preparation; this one is {__version__}. "
            "Update model_preparation."
        )
    if faults := verify(directory, files_only=True).faults:
        raise SurgeryError(
            f"{directory} is not changed, because a file differs from the build: {faults[0]}. "
            "Copy or download it again, or build it again."
        )
    with contextlib.ExitStack() as held:
        for path in _unfinished_evaluations(directory):
            held.callback(take(path).release)
        with new_folder(directory, overwrite=True, marker_file=INFO) as staging:
            _share_tree(directory, staging)
            try:
                _write_anew(staging, info, changed)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                raise SurgeryError(
                    f"{directory} is not changed, because its {INFO} or {_CONFIG} lacks a field or has a wrong one "
                    f"({error!r:.200}). Build it again."
                ) from error
            if read_info(directory) != info:
                raise SurgeryError(f"{directory / INFO} has changed meanwhile (a new score?). Run the command again.")
    return changed


def _unfinished_evaluations(directory: Path) -> Iterator[Path]:
    evaluations = directory / EVALUATIONS
    if not evaluations.is_symlink():
        for path in evaluations.glob("*.partial"):
            yield path.with_name(path.name.removesuffix(".partial"))


def _share_tree(source: Path, target: Path) -> None:
    """Fill the folder `target` with links to the files in `source`. Skip unfinished folders (NAME.partial)."""
    for path in source.iterdir():
        new = target / path.name
        if path.is_symlink():
            new.symlink_to(path.readlink())
        elif path.is_dir():
            if not is_partial(path.name):
                new.mkdir()
                _share_tree(path, new)
        else:
            share_file(regular_file(path), new)
    target.chmod(source.stat().st_mode)


def _write_anew(folder: Path, info: Mapping[str, Any], changed: list[str]) -> None:
    """Write the files that change with the code: `changed`, config.json, README.txt, checkpoint_info.json."""
    before, after = listed_code(info), describe_package_code()
    files = {name: entry for name, entry in info["files"].items() if name not in before} | after
    contents = {name: path.read_bytes() for name, path in package_code().items()}
    config = read_json(folder / _CONFIG)
    if config["auto_map"] != AUTO_MAP:
        contents[_CONFIG] = (json.dumps({**config, "auto_map": AUTO_MAP}, indent=2, ensure_ascii=False) + "\n").encode()
    if README in files:
        contents[README] = readme_text({**info, "files": files}).encode()
    for name in {*changed, *contents, INFO}:
        (folder / name).unlink(missing_ok=True)  # it may be a link to the file in the old folder
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        files[name] = describe_file(folder / name)
    update = {
        "time": creation_time(),
        "model_preparation": __version__,
        "from": {name: entry["sha256"] for name, entry in before.items()},
        "to": {name: entry["sha256"] for name, entry in after.items()},
    }
    updates = [*info.get(CODE_UPDATES, []), update]
    (folder / INFO).write_bytes(with_checksum({**info, "files": files, "code": code_digests(), CODE_UPDATES: updates}))
