"""Which weights a checkpoint has now, as one digest.

In: a checkpoint's folder. Out: a BLAKE3 over the files `load_checkpoint` reads. What was read once is remembered beside
the results and not read again while size, time and inode of the file are the same.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from blake3 import blake3

from model_preparation.files.known_digests import examine, recall, remember
from model_preparation.surgery.checkpoint_info import STATE_DICT

KNOWN = ".weights"  # in the folder of a checkpoint's evaluations


def weights_digest(directory: Path, info: dict[str, Any], root: Path) -> str:
    """BLAKE3, in hex, over the weight files of a checkpoint and its config.

    Args:
        directory: the checkpoint's folder.
        info: its checkpoint_info.json.
        root: where its evaluations are; what is known of the files is kept in it.

    Raises:
        OSError: if a file is missing or cannot be read.
    """
    names = (
        [STATE_DICT]
        if info.get("format") != "hf"
        else [name for name in info["files"] if name.endswith(".safetensors")]
    )
    digest = blake3(json.dumps(info["config"], sort_keys=True).encode())
    for name in sorted(names):
        record = root / KNOWN / f"{name}.json"
        known = recall(directory / name, record)
        if known is None:
            known, settled = examine(directory / name)
            if settled:
                with contextlib.suppress(OSError):  # what cannot be remembered is read again
                    record.parent.mkdir(parents=True, exist_ok=True)
                    remember(known, record)
        digest.update(f"{name} {known.digest}\n".encode())
    return digest.hexdigest()
