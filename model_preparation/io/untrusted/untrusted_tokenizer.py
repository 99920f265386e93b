"""Loads a stranger's tokenizer, and runs its chat template within limits.

The tokenizer's own code is not run, and no file outside its folder is read. transformers runs templates in Jinja's
sandbox. The sandbox blocks access to files and to Python's internals. It does not block endless loops or texts of many
gigabytes, so templates run in a process with limits.
"""

import codecs
import contextlib
import os
import resource
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError, one_line
from model_preparation.io.untrusted.not_a_model import WEIGHTS
from model_preparation.io.untrusted.untrusted_files import inside, own_file, read_json, regular_file
from model_preparation.llamba.configuration_llamba import LlambaConfig

_SECONDS = 10  # of processor time
_MEMORY_BYTES = 1 << 30  # in addition to what the process has
_MAX_TEXT_BYTES = 64_000_000


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder.

    Raises:
        SurgeryError: if transformers cannot load it, or if it refers to files outside the folder.
    """
    _check_files(folder)
    AutoConfig.register("llamba", LlambaConfig, exist_ok=True)  # for folders with a Llamba's config.json
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.decode(tokenizer("Layers 11 and 13.")["input_ids"])  # some damage shows only in use
        tokenizer.init_kwargs["local_files_only"] = False  # HF_HUB_OFFLINE makes it true, and that would be saved
        return tokenizer
    except BaseException as error:  # tokenizers also raises Rust's panics, which are no Exception
        panics = type(error).__name__ == "PanicException"
        if not panics and not isinstance(error, Exception):
            raise
        reason = ("tokenizer.json is damaged: " if panics else "") + one_line(error)
        raise SurgeryError(
            f"No tokenizer can be loaded from {folder} ({reason}). Name one with --tokenizer."
        ) from error


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The text that the tokenizer's chat template makes of the messages, up to the beginning of the answer.

    Raises:
        ValueError: with the reason why the template makes no text.
    """
    return within_limits(
        lambda: str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    )


def within_limits(render: Callable[[], str]) -> str:
    """Return the text that `render` makes. `render` runs a stranger's template, so a process with limits calls it.

    Raises:
        ValueError: with the reason why there is no text.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about threads, which the child does not use
        child = os.fork()
    if child == 0:
        _answer(render, writer)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            answer = pipe.read(_MAX_TEXT_BYTES)
    finally:
        os.kill(child, signal.SIGKILL)  # the child has ended, or must end now
        os.waitpid(child, 0)
    text = answer[1:].decode(errors="replace")  # a text that is too long may be cut inside a character
    if answer[:1] == b"+" and len(answer) < _MAX_TEXT_BYTES:
        return text
    raise ValueError(text if answer[:1] == b"-" else f"it takes more than {_SECONDS} seconds, or writes without end")


def _check_files(folder: Path) -> None:
    for path in sorted(folder.glob("*")):
        if not path.is_dir():
            with contextlib.suppress(FileNotFoundError):  # a link to a missing file
                # Weights may be Git LFS pointers: the tokenizer works without them.
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
        # transformers opens this file, if it exists
        if name.endswith("_file") and isinstance(value, str) and os.path.lexists(folder / value):
            inside(folder, value)


def _check_beginning(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            raise SurgeryError(
                f"{path} begins with a byte-order mark, which transformers cannot read. "
                "Save it as UTF-8 without the mark."
            )


def _answer(render: Callable[[], str], writer: int) -> NoReturn:
    """Write "+" and the text, or "-" and the reason, to the pipe; then end this process."""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        if Path("/proc/self/statm").exists():
            used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used_bytes + _MEMORY_BYTES, resource.RLIM_INFINITY))
        try:
            answer = "+" + render()
        except Exception as error:  # a template may raise any exception
            answer = f"-{' '.join(str(error).split())[:500] or type(error).__name__}"
        with open(writer, "wb") as pipe:
            pipe.write(answer.encode("utf-8", "replace"))
    finally:
        os._exit(0)
