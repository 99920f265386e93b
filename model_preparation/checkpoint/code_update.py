"""This package's model code in a checkpoint of format hf that was written with other code.

In: the folder. Out: the same folder with today's code files, with the README.txt and the digests that go with them, and
with a record of the change in checkpoint_info.json. The weights stay the files they were. The new folder is made beside
the old one, of links, and takes its place in one step: killed at any moment, the old or the new one is there, whole.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from model_preparation.checkpoint.checkpoint_info import EVALUATIONS, INFO, README, formats_of, read_info
from model_preparation.checkpoint.checkpoint_readme import readme_text
from model_preparation.checkpoint.model_code import (
    AUTO_MAP,
    CODE_UPDATES,
    code_digests,
    describe_package_code,
    differing_code,
    has_code,
    is_newer,
    listed_code,
    package_code,
)
from model_preparation.checkpoint.verify import inspect
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_folder import new_folder, remove_abandoned
from model_preparation.io.digests import describe_file
from model_preparation.io.folder_lock import is_partial, take
from model_preparation.io.self_checksum import with_checksum
from model_preparation.io.shared_files import share_file
from model_preparation.io.untrusted.untrusted_files import read_json, regular_file
from model_preparation.versions import __version__, creation_time

_CONFIG = "config.json"


def update_code(directory: str | Path) -> list[str]:
    """Put this package's model code into a checkpoint's folder.

    Args:
        directory: a folder written by `build_checkpoint` with format "hf" or "both".

    Returns:
        The names of the code files that changed; none if the folder has this package's code already, or needs none.

    Raises:
        SurgeryError: if there is no checkpoint in `directory`, a file of it is not as it was written, its code is of a
            newer version of this package, or another process is writing there.
        OSError: from the file system; the folder is as it was then.
    """
    directory = Path(directory).expanduser()
    if (folder := directory.resolve()).parent.is_dir():
        remove_abandoned(folder.parent, only_for=folder)  # of a run that was killed; it may hold the folder itself
    if has_code(directory) and not (directory / INFO).exists():
        raise SurgeryError(
            f"{directory} has no {INFO} (save_pretrained writes none), so nobody can tell whether its files are whole. "
            "Import model_preparation, load it by from_pretrained, and save it into a new folder: that puts this "
            "package's code there."
        )
    info = read_info(directory)
    changed = differing_code(listed_code(info))
    if "hf" not in formats_of(info) or not changed:
        return []
    if is_newer(info):
        raise SurgeryError(
            f"{directory} has the model's code of a newer model_preparation than this one, which is "
            f"{__version__}. Update model_preparation."
        )
    if faults := inspect(directory, files_only=True).faults:
        raise SurgeryError(
            f"{directory} is left as it is, because it is not what was built: {faults[0]}. "
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
                    f"{directory} is left as it is, because its {INFO} or {_CONFIG} is not what a build writes "
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
    """Fill the folder `target` with links to what is in `source`, without what is just being made there."""
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
    """Write what changes with the code: the files `changed`, config.json, README.txt, checkpoint_info.json."""
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
