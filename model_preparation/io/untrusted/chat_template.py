"""A chat template, which is a stranger's program: run where it can neither go on for ever nor take all memory.

In: a tokenizer and messages. Out: the text that the template makes of them. transformers runs templates in Jinja's
sandbox, which keeps them from files and from Python's insides, but not from loops in loops or texts of many gigabytes.
"""

import os
import resource
import signal
import warnings
from pathlib import Path
from typing import NoReturn

from transformers import PreTrainedTokenizerBase

_SECONDS = 10  # of processor time
_MEMORY_BYTES = 1 << 30
_MAX_TEXT_BYTES = 64_000_000


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The messages and the beginning of the answer, as the tokenizer's chat template writes them.

    Raises:
        ValueError: saying why the template makes no text of them.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the child uses none of them
        child = os.fork()
    if child == 0:
        _answer(tokenizer, messages, writer)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            answer = pipe.read(_MAX_TEXT_BYTES)
    finally:
        os.kill(child, signal.SIGKILL)  # it has ended already, or must
        os.waitpid(child, 0)
    text = answer[1:].decode()
    if answer[:1] == b"+" and len(answer) < _MAX_TEXT_BYTES:
        return text
    raise ValueError(text if answer[:1] == b"-" else f"it takes more than {_SECONDS} seconds, or writes without end")


def _answer(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], writer: int) -> NoReturn:
    """Write + and the text, or - and the reason, and end this process."""
    try:
        resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
        if Path("/proc/self/statm").exists():
            used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used_bytes + _MEMORY_BYTES, resource.RLIM_INFINITY))
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            answer = "+" + str(text)
        except Exception as error:  # a template may raise any
            answer = f"-{' '.join(str(error).split())[:500] or type(error).__name__}"
        with open(writer, "wb") as pipe:
            pipe.write(answer.encode("utf-8", "replace"))
    finally:
        os._exit(0)
