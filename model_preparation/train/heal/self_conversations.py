"""Conversations that the donor writes, so that healing uses the donor's own text and not other people's.

The donor first gets the chat template's text before the user's words, and writes these words. Then it gets the
template's text between question and answer, and writes the answer. Source: Xu et al., arXiv 2406.08464 (Magpie). A
batch depends only on its seed.
"""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from model_preparation.checkpoint.model_configs import read_config
from model_preparation.checkpoint.model_digests import digest_of_model
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import has_tokenizer
from model_preparation.io.complete_file import make_folder, write_file
from model_preparation.io.progress import bar
from model_preparation.io.result_inputs import digest_of
from model_preparation.io.text import read_text
from model_preparation.io.untrusted.untrusted_tokenizer import apply_chat_template, load_tokenizer, within_limits
from model_preparation.train.conversations import Conversation
from model_preparation.train.distill.self_sampling import SEQUENCES_AT_ONCE, SelfSampler, batch_seed
from model_preparation.train.heal.conversation_tokens import encode
from model_preparation.train.heal.settings import HealSettings

FOLDER = "written_by_donor"  # in the folder of states; the name ends in a digest of the text's inputs
_LEAST_ENDED, _JUDGED_FROM = 16, 64  # from 64 conversations on, the run fails if fewer than one in 16 was finished
_WORDS = "WORDS-OF-THE-TURN"


def write_conversations(
    donor: Path, tokenizer: PreTrainedTokenizerBase, settings: HealSettings, states: Path, device: str
) -> Path:
    """Let the donor write conversations, at least as many as the settings ask for. Returns the folder with them.

    Each batch of conversations is a .jsonl file. After a kill, the next run keeps the files and writes only the others.

    Args:
        donor: the donor's folder. Its own tokenizer is used, if it has one.
        tokenizer: the checkpoint's tokenizer. Its template is used.

    Raises:
        SurgeryError: if there is no usable template, or the donor finishes too few conversations.
    """
    own, template = tokenizer, tokenizer.chat_template
    if not template:
        raise SurgeryError(
            "The checkpoint's tokenizer has no chat template, so the donor cannot write conversations. Give one by "
            "--chat_template FILE, or texts by --data."
        )
    if has_tokenizer(donor):
        tokenizer = load_tokenizer(donor)
        tokenizer.chat_template = template
    wanted, length = settings.self_conversations, settings.block_size
    asked = {"donor": digest_of_model(donor), "template": template, "seed": settings.seed}
    folder = states / f"{FOLDER}_{digest_of({**asked, 'count': wanted, 'length': length})[:12]}"
    make_folder(folder)
    template_tokens, sampler = _TemplateTokens(tokenizer, donor), None
    count = number = 0
    with bar("Conversations", wanted) as advance:
        while count < wanted:
            begun = number * SEQUENCES_AT_ONCE
            if begun >= _JUDGED_FROM and count * _LEAST_ENDED < begun:
                raise SurgeryError(
                    f"The donor began {begun} conversations, but finished only {count} within --block_size {length} "
                    f"tokens; at least one in {_LEAST_ENDED} is needed. Give a larger --block_size."
                )
            path = folder / f"{number:05}.jsonl"
            if not path.exists():
                if sampler is None:
                    print(f"The donor writes {wanted} conversations ...", flush=True)
                    sampler = SelfSampler(donor, read_config(donor), device)
                finished = template_tokens.write_batch(sampler, length, batch_seed(settings.seed, number))
                rows = [Conversation(each, ("messages",), donor.name) for each in finished]
                sizes = [ids.shape[1] for ids in encode(own, rows, "assistant")]
                # The checkpoint's tokenizer can give more tokens for the words than the donor drew.
                written = [each for each, size in zip(finished, sizes, strict=True) if size <= length]
                write_file(path, "".join(json.dumps({"messages": each}, ensure_ascii=False) + "\n" for each in written))
            found = read_text(path).count("\n")
            advance(found)
            count, number = count + found, number + 1
    return folder


class _TemplateTokens:
    """The tokens that a chat template puts before, between and after the user's words and the answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, donor: Path):
        user = [{"role": "user", "content": _WORDS}]
        answered = [*user, {"role": "assistant", "content": _WORDS}]
        try:
            asked = apply_chat_template(tokenizer, user)
            whole = within_limits(lambda: str(tokenizer.apply_chat_template(answered, tokenize=False)))
        except ValueError as error:
            raise SurgeryError(f"The template fails for {donor} ({error}). Give another by --chat_template.") from error
        (before, _, between), (_, _, behind) = asked.partition(_WORDS), whole.rpartition(_WORDS)
        self._tokenizer = tokenizer
        self._before, self._between, behind_ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, between, behind)
        )
        if not self._between or not behind_ids:
            raise SurgeryError(
                f"The chat template puts nothing after a turn, so nothing shows where the words of {donor} end. Give "
                "another by --chat_template FILE."
            )
        self._end = behind_ids[0]
        self._marks = set(tokenizer.get_added_vocab().values())

    def write_batch(self, sampler: SelfSampler, length: int, seed: int) -> list[list[dict[str, Any]]]:
        """Let the donor write a batch. Returns the messages of each conversation that ended within `length` tokens."""
        turns: list[list[list[int]]] = [[] for _ in range(SEQUENCES_AT_ONCE)]
        writers = dict(enumerate(self._write_turns(each) for each in turns))
        for writer in writers.values():
            next(writer)

        def steer(drawn: list[int]) -> list[int] | None:
            for row, writer in list(writers.items()):
                try:
                    drawn[row] = writer.send(drawn[row])
                except StopIteration:
                    del writers[row]
            return drawn if writers else None

        sampler.draw(len(turns), length, seed, lambda tokens: None, begin=self._before, steer=steer)
        texts = [[self._tokenizer.decode(turn) for turn in each] for each in turns if len(each) == 2]
        return [
            [{"role": role, "content": text} for role, text in zip(("user", "assistant"), both, strict=True)]
            for both in texts
            if all(text.strip() for text in both)
        ]

    def _write_turns(self, turns: list[list[int]]) -> Generator[int, int, None]:
        """Receives each drawn token by `send`, and yields the token to take. Adds each turn that ends to `turns`."""
        taken = 0
        for end, following in ((self._between[0], self._between[1:]), (self._end, [])):
            words = []
            while (token := (yield taken)) != end:
                if token in self._marks:  # another special token: drop the conversation
                    return
                words.append(token)
                taken = token
            turns.append(words)
            taken = end
            for each in following:  # the template's tokens replace the drawn ones
                yield taken
                taken = each
