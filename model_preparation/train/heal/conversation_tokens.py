"""Turns conversations into tokens with a chat template, and finds the tokens to learn.

If the template has generation tags that mark text, this text is the assistant's. Otherwise the template renders the
messages before a turn, with the generation prompt. Then the template renders the same messages and the turn.
The turn's text is what the second text adds to the first.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from model_preparation.errors import SurgeryError, one_line
from model_preparation.io.untrusted.untrusted_tokenizer import within_limits
from model_preparation.train.conversations import Conversation, Message

NOT_COUNTED = -100  # the label of tokens that are not learned, here as in transformers
_TAGS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_AT_ONCE = 64  # conversations that one child process renders
_MARK_OR_LEARN_ALL = "Put {% generation %} around the assistant's words in the template, or give --loss_on all."

Span = tuple[int, int]


def encode(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], loss_on: str) -> list[np.ndarray]:
    """For each conversation an int32 array (2, tokens): the token ids, then the labels (-100 for tokens without loss).

    Args:
        tokenizer: it must have a chat template.
        loss_on: "assistant" for every turn of the assistant, "completion" for its last turn, "all" for all tokens.

    Raises:
        SurgeryError: for a conversation that the template refuses, or in which no token would be learned; for a
            tokenizer without tokenizer.json.
    """
    if not tokenizer.is_fast:
        raise SurgeryError("The tokenizer has no tokenizer.json, so the tokens' places in a text are unknown. Add one.")
    encoded: list[np.ndarray] = []
    for first in range(0, len(conversations), _AT_ONCE):
        some = conversations[first : first + _AT_ONCE]
        rendered = _rendered(tokenizer, some, loss_on)
        texts = [text for text, _, _ in rendered]
        found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for conversation, (_, spans, fault), ids, offsets in zip(
            some, rendered, found["input_ids"], found["offset_mapping"], strict=True
        ):
            if fault:
                raise SurgeryError(f"The chat template cannot be used for {conversation.where}: {fault}")
            counted = np.zeros(len(ids), dtype=bool)
            begins, ends = np.array(offsets).reshape(-1, 2).T
            for start, end in spans:
                counted |= (begins < end) & (ends > start)
            counted[:1] = False  # no earlier token predicts the first token
            if not counted.any():
                raise SurgeryError(
                    f"With this chat template, {conversation.where} has no token to learn. Give another template by "
                    "--chat_template FILE, or --loss_on all."
                )
            encoded.append(np.stack([np.array(ids), np.where(counted, ids, NOT_COUNTED)]).astype(np.int32))
    return encoded


def _rendered(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], loss_on: str
) -> list[tuple[str, list[Span], str]]:
    """For each conversation: its text, the spans of characters to learn, and an error message ("" if there is none)."""
    template = tokenizer.get_chat_template()
    marks = tuple(tokenizer.get_added_vocab())

    def render(messages: list[Message], **more: Any) -> tuple[str, list[Span]]:
        options = {"chat_template": template, **tokenizer.special_tokens_map, **more}
        texts, spans = render_jinja_template([messages], **options)
        return texts[0], spans[0] if spans else []

    def one(messages: list[Message]) -> tuple[str, list[Span], str]:
        try:
            text, spans = render(messages, return_assistant_tokens_mask=bool(_TAGS.search(template)))
            if loss_on == "all":
                return text, [(0, len(text))], ""
            all_turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
            if not all_turns:
                return (
                    text,
                    [],
                    "the conversation has no turn of the assistant. Leave the row out, or give --loss_on all.",
                )
            turns = all_turns[-1:] if loss_on == "completion" else all_turns
            if not spans:
                for index in turns:
                    span = _turn(text, messages, index, lambda *args, **more: render(*args, **more)[0])
                    if span is None:
                        unseen = f"turn {all_turns.index(index) + 1} of the assistant"
                        return text, [], f"it does not show where {unseen} is. {_MARK_OR_LEARN_ALL}"
                    spans.append(span)
            elif loss_on == "completion":
                begin = len(render(messages[: turns[-1]])[0])
                spans = [span for span in spans if span[1] > begin]
            return text, [_with_end(text, *span, marks) for span in spans], ""
        except TemplateSyntaxError as error:
            fault = f"it is no Jinja template (line {error.lineno}: {error.message})."
            return "", [], f"{fault} Give another by --chat_template FILE."
        except Exception as error:  # a template may raise any exception
            return "", [], f"{one_line(error)}. Correct the row, or give another template by --chat_template FILE."

    try:
        return json.loads(within_limits(lambda: json.dumps([one(each.messages) for each in conversations])))
    except ValueError as error:
        return [("", [], f"{error}. Give another template by --chat_template FILE.") for _ in conversations]


def _turn(text: str, messages: list[Message], index: int, render: Callable[..., str]) -> Span | None:
    """Where message `index`, a turn of the assistant, is in `text`, the rendering of all messages.

    None if the template changes the message, or renders earlier messages differently when more follow.
    """
    before, prompt = render(messages[:index]), render(messages[:index], add_generation_prompt=True)
    after = render(messages[: index + 1])
    begin = len(prompt)
    if prompt == before:  # no generation prompt: a turn begins with the role's name, which is not learned
        begin = after.find(messages[index]["content"].strip(), begin)
    if begin < 0 or not after.startswith(prompt) or not text.startswith(after):
        return None
    return begin, len(after)


def _with_end(text: str, begin: int, end: int, marks: tuple[str, ...]) -> Span:
    """The span of a turn, with the token that ends the turn, but without spaces after that token."""
    turn = text[begin:end]
    if (stripped := turn.rstrip()).endswith(marks):
        return begin, begin + len(stripped)
    following = next((mark for mark in marks if text.startswith(mark, end)), "")
    return begin, end + len(following)
