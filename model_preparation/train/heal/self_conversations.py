"""Conversations that the donor writes by itself, to heal on what it says rather than on what others wrote.

The donor begins where its chat template puts the user's words, and writes them. Then the template's words follow, and
the donor answers. Source: Xu et al., arXiv 2406.08464 (Magpie). A batch depends on its seed alone.
"""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from model_preparation.checkpoint.digests import digest_of_model
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import has_tokenizer
from model_preparation.io.complete_file import make_folder, write_file
from model_preparation.io.progress import bar
from model_preparation.io.result_inputs import digest_of
from model_preparation.io.text import read_text
from model_preparation.io.untrusted.tokenizer_files import apply_chat_template, load_tokenizer, within_limits
from model_preparation.train.conversations import Conversation
from model_preparation.train.distill.self_sampling import SEQUENCES_AT_ONCE, SelfSampler
from model_preparation.train.heal.chat_template import encode
from model_preparation.train.heal.settings import HealSettings

FOLDER = "written_by_donor"  # in the folder of the states; what follows is a digest of all that the words depend on
_LEAST_ENDED, _JUDGED_FROM = 16, 64  # a donor that ends less than one of 16, of at least 64, counts as unable
_WORDS = "WORDS-OF-THE-TURN"


def write_conversations(
    donor: Path, tokenizer: PreTrainedTokenizerBase, settings: HealSettings, states: Path, device: str
) -> Path:
    """A folder of .jsonl files with the conversations, at least as many as the settings ask for.

    Each batch is a file. A run that was killed keeps the files that it wrote, and continues.

    Args:
        donor: its folder. Its own tokenizer is taken, if it has one.
        tokenizer: the checkpoint's, whose template is taken.

    Raises:
        SurgeryError: if there is no template, or the donor ends too few conversations.
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
    script, sampler = _Script(tokenizer, donor), None
    count = number = 0
    with bar("Conversations", wanted) as advance:
        while count < wanted:
            begun = number * SEQUENCES_AT_ONCE
            if begun >= _JUDGED_FROM and count * _LEAST_ENDED < begun:
                raise SurgeryError(
                    f"Of {begun} conversations that the donor began, it ended {count} within --block_size {length} "
                    f"tokens; at least one of {_LEAST_ENDED} is needed. Give a larger --block_size."
                )
            path = folder / f"{number:05}.jsonl"
            if not path.exists():
                if sampler is None:
                    print(f"The donor writes {wanted} conversations ...", flush=True)
                    sampler = SelfSampler(donor, read_config(donor), device)
                # The factor keeps the batches of neighbouring seeds apart; torch takes no larger seeds.
                played = script.play(sampler, length, (settings.seed * 1_000_003 + number) % 2**63)
                sizes = encode(own, [Conversation(each, ("messages",), donor.name) for each in played], "assistant")
                # The same words can be more tokens than the donor drew.
                written = [each for each, ids in zip(played, sizes, strict=True) if ids.shape[1] <= length]
                write_file(path, "".join(json.dumps({"messages": each}, ensure_ascii=False) + "\n" for each in written))
            found = read_text(path).count("\n")
            advance(found)
            count, number = count + found, number + 1
    return folder


class _Script:
    """What a chat template puts before, between and behind the words of the user and the answer, as tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, donor: Path):
        user = [{"role": "user", "content": _WORDS}]
        answered = [*user, {"role": "assistant", "content": _WORDS}]
        try:
            asked = apply_chat_template(tokenizer, user)
            whole = within_limits(lambda: str(tokenizer.apply_chat_template(answered, tokenize=False)))
        except ValueError as error:
            raise SurgeryError(f"The chat template of {donor} fails ({error}). Give one by --chat_template.") from error
        (before, _, between), (_, _, behind) = asked.partition(_WORDS), whole.rpartition(_WORDS)
        self._tokenizer = tokenizer
        self._before, self._between, behind_ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, between, behind)
        )
        if not self._between or not behind_ids:
            raise SurgeryError(
                f"The chat template of {donor} puts nothing behind a turn, so no end is seen. Give one by "
                "--chat_template FILE."
            )
        self._end = behind_ids[0]
        self._marks = set(tokenizer.get_added_vocab().values())

    def play(self, sampler: SelfSampler, length: int, seed: int) -> list[list[dict[str, Any]]]:
        """The messages of the conversations that came to their end within `length` tokens, of one batch."""
        turns: list[list[list[int]]] = [[] for _ in range(SEQUENCES_AT_ONCE)]
        speakers = dict(enumerate(self._speak(each) for each in turns))
        for speaker in speakers.values():
            next(speaker)

        def steer(drawn: list[int]) -> list[int] | None:
            for row, speaker in list(speakers.items()):
                try:
                    drawn[row] = speaker.send(drawn[row])
                except StopIteration:
                    del speakers[row]
            return drawn if speakers else None

        sampler.draw(len(turns), length, seed, lambda tokens: None, begin=self._before, steer=steer)
        texts = [[self._tokenizer.decode(turn) for turn in each] for each in turns if len(each) == 2]
        return [
            [{"role": role, "content": text} for role, text in zip(("user", "assistant"), both, strict=True)]
            for both in texts
            if all(text.strip() for text in both)
        ]

    def _speak(self, turns: list[list[int]]) -> Generator[int, int, None]:
        """Gets each token that is drawn, and gives the one to take. A turn is added when it has ended."""
        taken = 0
        for end, following in ((self._between[0], self._between[1:]), (self._end, [])):
            words = []
            while (token := (yield taken)) != end:
                if token in self._marks:  # it ends no turn
                    return
                words.append(token)
                taken = token
            turns.append(words)
            taken = end
            for each in following:  # whatever is drawn
                yield taken
                taken = each
