"""A tokenizer out of a folder that a stranger made: no code of its own, no files from elsewhere.

In: a folder. Out: transformers' tokenizer.
"""

import codecs
import contextlib
import os
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.io.untrusted.no_model import WEIGHTS
from model_preparation.io.untrusted.untrusted_files import inside, own_file, read_json, regular_file
from model_preparation.llamba.configuration_llamba import LlambaConfig


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        SurgeryError: if transformers cannot load it, or it leads to files outside the folder.
    """
    _check_files(folder)
    AutoConfig.register("llamba", LlambaConfig, exist_ok=True)  # a tokenizer may lie beside a Llamba's config.json
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.decode(tokenizer("Layers 11 and 13.")["input_ids"])  # some damage shows in use only
        return tokenizer
    except (
        BaseException
    ) as error:  # the tokenizers library raises plain ones, and panics of Rust, which are no Exception
        panics = type(error).__name__ == "PanicException"
        if not panics and not isinstance(error, Exception):
            raise
        reason = ("tokenizer.json is damaged: " if panics else "") + " ".join(str(error).split())[:200]
        raise SurgeryError(
            f"No tokenizer can be loaded from {folder} ({reason}). Name one with --tokenizer."
        ) from error


def _check_files(folder: Path) -> None:
    for path in sorted(folder.glob("*")):
        if not path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # a link to nothing
                # Whoever cloned no more than the text files still has a tokenizer.
                own_file(path) if path.suffix in WEIGHTS else regular_file(path)
                if path.suffix in (".json", ".jinja"):
                    _check_beginning(path)
    path = folder / "tokenizer_config.json"
    if not path.exists():
        return
    try:
        fields = read_json(path)
    except ValueError as error:
        raise SurgeryError(f"{path} cannot be read ({error}). Name another tokenizer with --tokenizer.") from error
    for name, value in fields.items():
        # transformers opens such a path; one that exists on its author's machine only does no harm
        if name.endswith("_file") and isinstance(value, str) and os.path.lexists(folder / value):
            inside(folder, value)


def _check_beginning(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            raise SurgeryError(
                f"{path} begins with a byte-order mark, which transformers cannot read. "
                "Save it as UTF-8 without the mark."
            )
