"""The language of the two embedded models: texts say who likes what, and a model has to look it up.

A text says what several people like, and later repeats some of it: `Ada likes plums . Ben likes figs . Ada
likes` must continue with `plums`. This is multi-query associative recall (Zoology, arXiv 2312.04927) in words. A third
of all pairs of a name and a thing is held out: no training text has such a pair. Questions have only held-out pairs,
and each of the four choices forms a held-out pair with the name. So remembering the training texts excludes no choice.

An untrained model hardly learns recall from such texts alone: it learns which things occur, and then nothing more. So
the donor is also trained on rows of names, or of things, in a random order that repeats after 4 to 20 words. In such a
row, after the first period, every word is a copy of an earlier one (induction heads, arXiv 2209.11895).
"""

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

# fmt: off
NAMES = [
    "Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ida", "Jan", "Kira", "Leo", "Mia", "Noah", "Olga",
    "Paul", "Quinn", "Rosa", "Sam", "Tess", "Uma", "Vera", "Will", "Zoe",
]
THINGS = [
    "apples", "beans", "cakes", "dates", "eggs", "figs", "grapes", "honey", "jam", "kiwis", "lemons", "melons",
    "nuts", "olives", "pears", "quinces", "rice", "soup", "tea", "plums", "waffles", "yams", "bread", "cheese",
]
# fmt: on
PAD, BOS, EOS, UNKNOWN, STOP, LIKES = "<pad>", "<s>", "</s>", "<unk>", ".", "likes"
WORDS = [PAD, BOS, EOS, UNKNOWN, STOP, LIKES, *NAMES, *THINGS]
FIRST_NAME = WORDS.index(NAMES[0])
FIRST_THING = WORDS.index(THINGS[0])
MAX_WORDS = 512
SENTENCE = 4  # words of `Ada likes plums .`

IGNORED = -100  # the label that torch's loss leaves out


@dataclass(frozen=True)
class Question:
    """A text whose next word is a thing, four things of the text as choices, and the index of the right choice."""

    context: str
    choices: list[str]
    answer: int


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word. It puts `<s>` before every text."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, WORDS.index(BOS))])
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=MAX_WORDS, **special)


def is_held_out(names: Tensor, things: Tensor) -> Tensor:
    """Which pairs are held out: bool. `names` and `things` are indices in `NAMES` and `THINGS`, and broadcast."""
    return (names + things) % 3 == 0


def training_texts(batch: int, people: int, sentences: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts about `people` people. Each person likes one thing; each sentence is about a person chosen at random.

    Returns:
        Token ids and labels, (batch, 1 + 4 * sentences) int64. A thing has a label if its sentence is a repetition.
    """
    names, things = _pairs(batch, people, generator, held_out=False)
    drawn = torch.randint(people, (batch, sentences), generator=generator)
    ids = _text(names.gather(1, drawn), things.gather(1, drawn))
    was_there = torch.tril(drawn.unsqueeze(2) == drawn.unsqueeze(1), -1).any(2)
    places = 3 + SENTENCE * torch.arange(sentences)
    labels = torch.full_like(ids, IGNORED)
    labels[:, places] = torch.where(was_there, ids[:, places], IGNORED)
    return ids, labels


def repeated_words(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of names, or of things, in a random order that repeats. Each row repeats after a random 4 to 20 words.

    No row has both names and things, so the rows train no pair of a name and a thing.

    Returns:
        Token ids and labels, (batch, length) int64: labels begin where the order begins to repeat.
    """
    first = torch.tensor([FIRST_NAME, FIRST_THING])[torch.randint(2, (batch, 1), generator=generator)]
    orders = torch.rand(batch, len(NAMES), generator=generator).argsort(1) + first
    periods = torch.randint(4, 21, (batch, 1), generator=generator)
    places = torch.arange(length - 1)
    ids = torch.cat([torch.full((batch, 1), WORDS.index(BOS)), orders.gather(1, places % periods)], 1)
    labels = ids.masked_fill(torch.arange(length) <= periods, IGNORED)
    return ids, labels


def questions(count: int, people: int, generator: torch.Generator) -> list[Question]:
    """`count` questions about pairs that are never trained on; each text is about `people` people."""
    found: list[Question] = []
    while len(found) < count:
        names, things = (row[0] for row in _pairs(1, people, generator, held_out=True))
        asked = int(torch.randint(people, (), generator=generator))
        could_be = is_held_out(names[asked], things).nonzero().flatten()
        if len(could_be) < 4:
            continue
        others = could_be[could_be != asked]
        chosen = others[torch.randperm(len(others), generator=generator)[:3]].tolist()
        answer = int(torch.randint(4, (), generator=generator))
        chosen.insert(answer, asked)
        text = " ".join(WORDS[index] for index in _text(names[None], things[None])[0, 1:])
        choices = [THINGS[things[place]] for place in chosen]
        found.append(Question(f"{text} {NAMES[names[asked]]} {LIKES}", choices, answer))
    return found


def _pairs(batch: int, people: int, generator: torch.Generator, *, held_out: bool) -> tuple[Tensor, Tensor]:
    """Indices of names and things, (batch, people) int64 each, without repeats in a row.

    Args:
        held_out: whether every pair is a held-out one, or none is.
    """
    names = torch.rand(batch, len(NAMES), generator=generator).argsort(1)[:, :people]
    things = torch.full_like(names, -1)
    every_thing = torch.arange(len(THINGS))
    open_rows = torch.arange(batch)
    while len(open_rows):  # if no thing is left for a name of a row, the row's things are drawn again
        free = torch.ones(len(open_rows), len(THINGS), dtype=torch.bool)
        complete = torch.ones(len(open_rows), dtype=torch.bool)
        for place in range(people):
            fits = free & (is_held_out(names[open_rows, place, None], every_thing) == held_out)
            drawn = torch.rand(fits.shape, generator=generator).masked_fill(~fits, -1).argmax(1)
            things[open_rows, place] = drawn
            complete &= fits.any(1)
            free.scatter_(1, drawn[:, None], False)
        open_rows = open_rows[~complete]
    return names, things


def _text(names: Tensor, things: Tensor) -> Tensor:
    """Token ids of `<s>` and one sentence for each pair: two (batch, sentences) -> (batch, 1 + 4 * sentences)."""
    likes, stop = (torch.full_like(names, WORDS.index(word)) for word in (LIKES, STOP))
    sentences = torch.stack([names + FIRST_NAME, likes, things + FIRST_THING, stop], 2).flatten(1)
    return torch.cat([torch.full((len(names), 1), WORDS.index(BOS)), sentences], 1)
