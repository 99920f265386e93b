"""Reads conversations to train on: turns a row in any of the common forms into a list of messages."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# For each form of a row: the fields that the row must have, then the other fields that it may have.
FORMS = {
    ("messages",): ("system",),
    ("conversations",): ("system",),
    ("query", "response"): ("system", "history"),
    ("instruction", "output"): ("input", "system", "history"),
}
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"} | {
    role: role for role in ("system", "user", "assistant", "tool")
}
_MAY_FOLLOW = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}
# These fields would change the meaning of a row. Healing does not support them.
UNSUPPORTED = ("tools", "images", "videos", "audios", "tool_calls", "function_call", "loss", "loss_scale", "weight")
# With one of these values, an unsupported field changes nothing, so the row is accepted.
_WITHOUT_EFFECT: tuple = (None, True, 1, "", "[]", [], {})

Message = dict[str, str]


class Conversation(NamedTuple):
    """A row's messages, the fields that its form needs, and the row's place, for error messages."""

    messages: list[Message]
    fields: tuple[str, ...]
    where: str


def conversation_of(row: Mapping[str, Any], where: str) -> Conversation | None:
    """The conversation in a row, or None if the row does not have the fields of any form.

    Raises:
        ValueError: for a conversation that cannot be trained on.
    """
    found = [needed for needed in FORMS if all(row.get(name) is not None for name in needed)]
    if not found:
        return None
    if len(found) > 1:
        forms = " and of ".join(", ".join(each) for each in found)
        raise ValueError(f"{where} has the fields of {forms}; one form is needed")
    [fields] = found
    _refuse_unsupported(row, where)
    if len(fields) == 1:
        given = row[fields[0]]
        if not isinstance(given, list) or not given:
            raise ValueError(f"{where} has {_shown(given)} as {fields[0]}; a list of messages is needed")
        pairs = [_role_and_content(each, f"message {number} of {where}") for number, each in enumerate(given, 1)]
    else:
        history = row.get("history") or []
        if not isinstance(history, list) or any(not isinstance(each, list) or len(each) != 2 for each in history):
            raise ValueError(f"{where} has the history {_shown(history)}; pairs [question, answer] are needed")
        question = row[fields[0]]
        if row.get("input"):
            question = [question, "\n", row["input"]]
        turns = [*history, (question, row[fields[1]])]
        pairs = [pair for asked, answer in turns for pair in (("user", asked), ("assistant", answer))]
    messages = [(f"message {number} of {where}", *pair) for number, pair in enumerate(pairs, 1)]
    if row.get("system"):
        messages.insert(0, (f"system of {where}", "system", row["system"]))
    return Conversation(_checked(messages), fields, where)


def _role_and_content(message: Any, where: str) -> tuple[Any, Any]:
    if isinstance(message, dict):
        _refuse_unsupported(message, where)
        for role, content in (("role", "content"), ("from", "value")):
            if message.get(role) is not None:
                return message[role], message.get(content)
    raise ValueError(f"{where} is {_shown(message)}; role and content are needed, or from and value")


def _checked(given_messages: Sequence[tuple[str, Any, Any]]) -> list[Message]:
    """Check roles, order and texts of (place, role, content), and return the messages."""
    messages: list[Message] = []
    before = ""  # the role of the previous turn; a system message is no turn
    for index, (place, given, content) in enumerate(given_messages):
        role = _ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise ValueError(f"{place} has the role {_shown(given)}; it must be one of {', '.join(_ROLES)}")
        if isinstance(content, list):  # the message is given in parts
            parts = [part.get("text") if isinstance(part, dict) else part for part in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else content
        if not isinstance(content, str):
            raise ValueError(f"{place} has the content {_shown(content)}; a text is needed, or parts of text")
        if role == "system" and index == 0:
            if content.strip():  # an empty system message has no effect
                messages.append({"role": role, "content": content})
            continue
        if role not in _MAY_FOLLOW[before]:
            after = f"after a turn of the {before}" if before else "at the beginning"
            raise ValueError(f"{place} is a turn of the {role} {after}; it must be {' or '.join(_MAY_FOLLOW[before])}")
        if not content.strip():
            raise ValueError(f"{place} is an empty turn of the {role}; a text is needed")
        messages.append({"role": role, "content": content})
        before = role
    return messages


def _refuse_unsupported(fields: Mapping[str, Any], where: str) -> None:
    for name in UNSUPPORTED:
        if fields.get(name) not in _WITHOUT_EFFECT:
            raise ValueError(f"{where} has {name} {_shown(fields[name])}, which healing does not support")


def _shown(value: Any) -> str:
    return f"{json.dumps(value, ensure_ascii=False, default=str):.80}"
