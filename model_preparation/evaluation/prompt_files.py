"""Read prompts from files. A prompt is a text to continue, or a conversation to answer."""

import json
from pathlib import Path
from typing import Any

from model_preparation.errors import SurgeryError
from model_preparation.io.text import read_text

# A text, or messages: [{"role": "user", "content": "Hello"}, ...].
Prompt = str | list[dict[str, Any]]

FORMS = 'a text, {"prompt": TEXT} or {"messages": [{"role": ROLE, "content": TEXT}, ...]}'


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read the prompts in a file, in the file's order.

    Args:
        path: .txt has one text per line. .jsonl has one JSON value per line. .json is a list of JSON values. Blank
            lines are skipped. A value is a string, {"prompt": text} or {"messages": [...]}; other fields are ignored.

    Raises:
        SurgeryError: if the file cannot be read, has no prompts, or a line or entry is not a prompt.
    """
    path = Path(path).expanduser()
    if path.suffix not in (".txt", ".jsonl", ".json"):
        raise SurgeryError(f"{path} has an unknown ending. Give a .txt, .jsonl or .json file.")
    try:
        text = read_text(path)
    except OSError as error:
        raise SurgeryError(f"{path} cannot be read ({error.strerror}). Give a file of prompts.") from error
    except ValueError as error:
        raise SurgeryError(f"{path} cannot be read: {error}.") from error
    # splitlines() would also split at characters that JSON strings may have.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    prompts: list[Prompt]
    if path.suffix == ".txt":
        prompts = [line.strip() for _, line in lines]
    elif path.suffix == ".jsonl":
        prompts = [
            _prompt(_parse(line, f"line {number} of {path}"), f"Line {number} of {path}") for number, line in lines
        ]
    else:
        entries = _parse(text, str(path))
        if not isinstance(entries, list):
            kind = "an object" if isinstance(entries, dict) else repr(entries)[:80]
            raise SurgeryError(f"{path} holds {kind}, not a list. Give a list of prompts: {FORMS}.")
        prompts = [_prompt(value, f"Entry {number} of {path}") for number, value in enumerate(entries, start=1)]
    if not prompts:
        raise SurgeryError(f"{path} has no prompts. Write at least one into it.")
    return prompts


def shown(prompt: Prompt) -> str:
    """The prompt as a text to read. A conversation becomes one line per message."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SurgeryError(f"The JSON in {where} cannot be read ({error}). Correct it.") from error


def _prompt(value: Any, where: str) -> Prompt:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, dict) and ("prompt" in value) != ("messages" in value):
        if isinstance(text := value.get("prompt"), str) and text.strip():
            return text
        messages = value.get("messages")
        if isinstance(messages, list) and messages and all(map(_is_message, messages)):
            if messages[-1]["role"] == "assistant":
                raise SurgeryError(f"{where} ends with an assistant message. End it with a user message.")
            return messages
    raise SurgeryError(
        f"{where} is not a prompt: {json.dumps(value, ensure_ascii=False):.200}. Use this form: {FORMS}."
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(field), str) for field in ("role", "content"))
