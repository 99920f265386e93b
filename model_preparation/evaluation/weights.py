"""Which weights a model has now, as one digest.

In: a `ScoredModel`. Out: a BLAKE3 over the files that are read of it. What was read once is remembered beside the
results and not read again while size, time and inode of the file are the same.
"""

import contextlib
import json
from pathlib import Path

from blake3 import blake3

from model_preparation.evaluation.scored_model import ScoredModel
from model_preparation.files.known_digests import examine, recall, remember

KNOWN = ".weights"  # in the folder of a checkpoint's evaluations


def weights_digest(model: ScoredModel, root: Path) -> str:
    """BLAKE3, in hex, over the weight files of a model and its config.

    Args:
        root: where its evaluations are; what is known of the files is kept in it.

    Raises:
        OSError: if a file is missing or cannot be read.
    """
    digest = blake3(json.dumps(model.config, sort_keys=True).encode())
    for name in sorted(model.weight_files):
        record = root / KNOWN / f"{name}.json"
        known = recall(model.folder / name, record)
        if known is None:
            known, settled = examine(model.folder / name)
            if settled:
                with contextlib.suppress(OSError):  # what cannot be remembered is read again
                    record.parent.mkdir(parents=True, exist_ok=True)
                    remember(known, record)
        digest.update(f"{name} {known.digest}\n".encode())
    return digest.hexdigest()
