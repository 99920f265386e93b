"""Recall tasks: documents of a chosen length, made from a seed, in which the model must look something up.

Each is a task of lm-eval. A task of RULER (arXiv 2404.06654) has RULER's fields, prompts and metric. `mqar` follows
Zoology (arXiv 2312.04927). A length counts the tokens of the model's own tokenizer, including the answer.
In most tasks, the model generates the answer. In NAME_choice and embedded_recall, the model's answer is the
likeliest of four choices from the text. NAME_choice has the same documents as the task NAME.
"""

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
from blake3 import blake3
from lm_eval.api.task import ConfigurableTask
from lm_eval.config.task import TaskConfig
from lm_eval.tasks.ruler.common_utils import postprocess_pred, string_match_all
from transformers import PreTrainedTokenizerBase

from model_preparation.embedded import recall as people
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.recall_wording import LANGUAGES, Texts
from model_preparation.io.text import read_text

CHOICE, GENERATED = "_choice", "_generated"
EMBEDDED_RECALL = "embedded_recall"
DOCUMENTS = 100  # for each task and length, unless --limit gives another number
_FIRST_LENGTH, _FIRST_EMBEDDED_LENGTH = 512, 64  # the shortest default length; each following one is twice as long
_CHOICES = 4
_NEEDLES = 4  # in niah_multi*, as in RULER
_HOPS = 4  # in variable_tracking, as in RULER
_QUERIES = 4  # successive documents of mqar with the same pairs; each one asks for another key
_LEAST_PEOPLE = 6  # with fewer people, there are rarely four things to choose from

Document = dict[str, Any]


@dataclass(frozen=True)
class _Maker:
    """How the documents of a task are made.

    Attributes:
        make: a function of (random numbers, number of pairs or sentences, recipe, the document's number). It returns
            `input` and `outputs`, and in some tasks `gen_prefix` (the beginning of the answer) and `choices` (the
            right one first).
        answer_tokens: tokens that are reserved for the answer. RULER's tasks have RULER's number.
        until: the texts that end an answer; RULER's tasks have none.
        has_choices: whether NAME_choice exists.
        least: the smallest number of pairs or sentences.
        has_filler: whether the document has sentences that --haystack replaces.
        sharing: how many successive documents have the same pairs; the last of them is the longest.
        prompt: the field of `Texts` with the question and the beginning of the answer; "" if the task has neither.
    """

    make: "Callable[[random.Random, int, RecallRecipe, int], Document]"
    answer_tokens: int
    until: tuple[str, ...] = ()
    has_choices: bool = False
    least: int = 1
    has_filler: bool = False
    sharing: int = 1
    prompt: str = ""

    def template(self, texts: Texts) -> str:
        """The prompt's template, as results record it."""
        return texts.space.join(getattr(texts, self.prompt)) if self.prompt else "{context}{query}"


def is_recall(name: str) -> bool:
    """Whether this file can make the documents of a task. For embedded_recall, the package also has fixed questions."""
    return name in _MAKERS or (name.endswith(CHOICE) and root_of(name) in _MAKERS and _maker(name).has_choices)


def root_of(name: str) -> str:
    """The name without the ending _choice or _generated. Tasks that differ only in the ending share their documents."""
    return name.removesuffix(CHOICE).removesuffix(GENERATED)


def recall_names() -> list[str]:
    """The names of all recall tasks."""
    return [each for name in _MAKERS for each in (name, name + CHOICE) if is_recall(each)]


def takes(name: str, setting: str) -> bool:
    """Whether the documents of a recall task depend on a setting: `lengths`, `language` or `haystack`."""
    if setting == "haystack":
        return _maker(name).has_filler
    return setting == "lengths" or not name.startswith(EMBEDDED_RECALL)  # embedded_recall is always in English


@dataclass(frozen=True)
class RecallRecipe:
    """Everything that the documents depend on.

    Attributes:
        tokenizer: the model's.
        max_length: tokens of the longest sequence that the model takes.
        lengths: tokens of a document and its answer. None: 512 (64 for embedded_recall), doubled up to `max_length`.
        language: a key of `LANGUAGES`.
        haystack: a file with sentences that replace the built-in filler.
        documents: the number of documents of each length.
        seed: for all random numbers.

    Raises:
        SurgeryError: for a length that the model does not take, or a haystack that cannot be read.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    lengths: Sequence[int] | None = None
    language: str = "en"
    haystack: str | Path | None = None
    documents: int = DOCUMENTS
    seed: int = 1234

    def __post_init__(self) -> None:
        if too_long := [length for length in self.lengths or () if length > self.max_length]:
            raise SurgeryError(
                f"The model takes at most {self.max_length} tokens, but --lengths has {too_long[0]}. "
                f"Give lengths up to {self.max_length}."
            )
        _ = self.filler

    @property
    def texts(self) -> Texts:
        return LANGUAGES[self.language]

    @cached_property
    def filler(self) -> list[str] | None:
        """The haystack's sentences; None without a haystack."""
        if self.haystack is None:
            return None
        try:
            text = read_text(Path(self.haystack).expanduser())
        except (OSError, ValueError) as error:
            raise SurgeryError(f"The haystack {self.haystack} cannot be read ({error}). Give a text file.") from error
        return re.findall(r"\S[^.!?。！？]*(?:[.!?。！？]+[\"'”’)]*|$)", " ".join(text.split()))

    def recorded(self, names: Sequence[str]) -> dict[str, Any]:
        """The settings that the documents of these tasks depend on, as results record them."""
        lengths = sorted({length for name in names for length in self.lengths_of(name)})
        digest = {} if self.filler is None else {"haystack": blake3(repr(self.filler).encode()).hexdigest()}
        return {"lengths": lengths, "language": self.language, **digest}

    def lengths_of(self, name: str) -> list[int]:
        """The lengths of a task's documents."""
        if self.lengths is not None:
            return sorted(set(self.lengths))
        length = _FIRST_EMBEDDED_LENGTH if name.startswith(EMBEDDED_RECALL) else _FIRST_LENGTH
        found = []
        while length <= self.max_length:
            found.append(length)
            length *= 2
        return found or [self.max_length]

    def tasks(self, name: str) -> list[ConfigurableTask]:
        """The tasks that a name stands for: one for each length.

        Raises:
            SurgeryError: if a length is too short for the task, the haystack is too short, or the tokenizer
                does not know all words of a document.
        """
        return [
            RecallTask(name, length, list(self._documents(name, length)), self.texts)
            for length in self.lengths_of(name)
        ]

    def _documents(self, name: str, length: int) -> Iterator[Document]:
        maker = _maker(name)
        largest = self._largest_that_fits(name, length)
        for index in range(self.documents):
            size = largest
            longest = index - index % maker.sharing + maker.sharing - 1
            while not self._fits(self._document(name, length, longest, size), maker, length):
                if size == maker.least:
                    raise self._too_short(name, length)
                size = max(maker.least, size - max(1, size // 50))
            yield self._document(name, length, index, size)

    def _largest_that_fits(self, name: str, length: int) -> int:
        """The largest number of pairs or sentences with which the first document fits, found by bisection.

        If documents share their pairs, the longest document of the first group is tried instead.
        """
        maker = _maker(name)
        index = maker.sharing - 1
        first = self._document(name, length, index, maker.least)
        if not self._fits(first, maker, length):
            raise self._too_short(name, length)
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in self._tokens(first["input"]):
            raise SurgeryError(
                f"The model's tokenizer does not know the words of {name}. Choose another --tasks or --language; for "
                f"tiny_llama and tiny_llamba, take {EMBEDDED_RECALL}."
            )
        sentences = self.filler if maker.has_filler else None

        def fits(size: int) -> bool:
            available = size if sentences is None else min(size, len(sentences))
            if not self._fits(self._document(name, length, index, available), maker, length):
                return False
            if available < size:
                raise SurgeryError(
                    f"The haystack {self.haystack} has {available} sentences, too few for {length} tokens of {name}. "
                    "Give a longer text, or shorter --lengths."
                )
            return True

        fitting, too_large = maker.least, 2 * maker.least
        while fits(too_large):
            fitting, too_large = too_large, 2 * too_large
        while too_large - fitting > 1:
            middle = (fitting + too_large) // 2
            fitting, too_large = (middle, too_large) if fits(middle) else (fitting, middle)
        return fitting

    def _document(self, name: str, length: int, index: int, size: int) -> Document:
        numbers = self.random(root_of(name), length, index)
        document = _maker(name).make(numbers, size, self, index)
        if "choices" in document:
            right = document["choices"][0]
            numbers.shuffle(document["choices"])
            document["answer"] = document["choices"].index(right)
        return {"index": index, **document, "max_length": length}

    def random(self, *key: str | int) -> random.Random:
        """A generator of random numbers. They depend on the seed and on `key` only."""
        return random.Random(repr((self.seed, *key)))

    def _fits(self, document: Document, maker: _Maker, length: int) -> bool:
        prompt = document["input"]
        if document.get("gen_prefix"):
            prompt += self.texts.space + document["gen_prefix"]
        return len(self._tokens(prompt)) + maker.answer_tokens <= length

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, verbose=False)["input_ids"]  # no warning about long texts: they are shortened later

    def _too_short(self, name: str, length: int) -> SurgeryError:
        return SurgeryError(f"{length} tokens are too few for a document of {name}. Give larger --lengths.")


class RecallTask(ConfigurableTask):
    """A recall task with documents of one length."""

    def __init__(self, name: str, length: int, documents: list[Document], texts: Texts):
        self._documents = documents
        has_prefix = "gen_prefix" in documents[0]
        delimiter = "" if documents[0]["input"][-1] in "？。" else " "
        prefix = {"gen_prefix": "{{gen_prefix}}"} if has_prefix else {}
        super().__init__(config={**_config(name, length, texts), "target_delimiter": delimiter, **prefix})

    def download(self, *_args: Any, **_kwargs: Any) -> None:
        self.dataset = {"test": datasets.Dataset.from_list(self._documents)}


def task_config(name: str) -> TaskConfig:
    """The config of a recall task, without a length."""
    return TaskConfig(**{**_config(name, 0, LANGUAGES["en"]), "task": name})


def _config(name: str, length: int, texts: Texts) -> dict[str, Any]:
    maker = _maker(name)
    common = {
        "task": f"{name}_{length}",
        "test_split": "test",
        "doc_to_text": "{{input}}",
        "num_fewshot": 0,
        "metadata": {"version": 1, "length": length, "template": maker.template(texts)},
    }
    if name.endswith(CHOICE) or name == EMBEDDED_RECALL:
        chosen = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer"}
        return {**common, **chosen, "metric_list": [_metric("acc")]}
    return {
        **common,
        "output_type": "generate_until",
        "doc_to_target": "{{outputs}}",
        "process_results": process_results,
        "metric_list": [_metric(str(length))],  # lm-eval's RULER tasks also name their metric after the length
        "generation_kwargs": {
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": maker.answer_tokens,
            "until": list(maker.until),
        },
    }


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def process_results(document: Document, results: list[str]) -> dict[str, float]:
    """{metric: share of the right values that the answer contains}, computed by lm-eval's own RULER functions."""
    return {str(document["max_length"]): string_match_all(postprocess_pred(results), [document["outputs"]])}


def longest_document(tokenizer: PreTrainedTokenizerBase, max_positions: int | None) -> int:
    """The most tokens that a document may have: the tokenizer's limit, or the model's, if the model has a lower one."""
    return min(max_positions or tokenizer.model_max_length, tokenizer.model_max_length)


def is_embedded(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer is that of tiny_llama and tiny_llamba, which has only the 54 words of embedded_recall."""
    return set(tokenizer.get_vocab()) == set(people.WORDS)


# --- Documents --------------------------------------------------------------------------------------------------------


def _kv_retrieval(numbers: random.Random, size: int, recipe: RecallRecipe, _index: int) -> Document:
    """A JSON dictionary, and the key whose value is asked for (arXiv 2307.03172)."""
    texts = recipe.texts
    pairs = dict(zip(_keys(numbers, size, texts, texts.key_length), _values(numbers, size), strict=True))
    asked = numbers.choice(list(pairs))
    return {
        **_asked(
            texts.kv,
            context=json.dumps({key: int(value) for key, value in pairs.items()}, ensure_ascii=False),
            query=asked,
        ),
        "outputs": [pairs[asked]],
        "choices": _four(numbers, pairs[asked], pairs.values()),
    }


def _mqar(_numbers: random.Random, size: int, recipe: RecallRecipe, index: int) -> Document:
    """Keys with their values, then solved queries, then the key whose value is asked for.

    The solved queries are those of the earlier documents with the same pairs.
    """
    group, query = divmod(index, _QUERIES)
    numbers, texts = recipe.random("mqar", size, group), recipe.texts
    pairs = dict(zip(_keys(numbers, size, texts, texts.key_length), _values(numbers, size, digits=2), strict=True))
    keys = numbers.sample(list(pairs), _QUERIES)
    lines = [f"{key} {value}" for key, value in pairs.items()]
    lines += [f"{key} {pairs[key]}" for key in keys[:query]]
    asked = keys[query]
    return {
        "input": "\n".join([*lines, asked]),
        "outputs": [pairs[asked]],
        "choices": _four(numbers, pairs[asked], pairs.values()),
    }


def _needles(keys: int = 1, values: int = 1, queries: int = 1) -> Callable[..., Document]:
    """A maker of RULER's haystacks: `keys` keys with `values` values each are hidden, and `queries` are asked for."""

    def make(numbers: random.Random, size: int, recipe: RecallRecipe, _index: int) -> Document:
        texts = recipe.texts
        names = numbers.sample(_phrases(texts), keys)
        found = {name: _values(numbers, values) for name in names}
        needles = [texts.needle.format(key=name, value=value) for name in names for value in found[name]]
        numbers.shuffle(needles)
        sentences = _filler(numbers, size, recipe)
        depths = sorted(numbers.sample(range(len(sentences) + 1), len(needles)), reverse=True)
        for depth, needle in zip(depths, needles, strict=True):
            sentences.insert(depth, needle)
        asked = numbers.sample(names, queries)
        outputs = [value for name in asked for value in found[name]]
        between, last = texts.joined
        query = asked[0] if queries == 1 else between.join(asked[:-1]) + last + asked[-1]
        several = queries * values > 1
        template = texts.needles if several else texts.one_needle
        document = {**_asked(template, context=texts.space.join(sentences), query=query), "outputs": outputs}
        if not several and keys >= _CHOICES:
            document["choices"] = _four(numbers, outputs[0], [value for each in found.values() for value in each])
        return document

    return make


def _variable_tracking(numbers: random.Random, size: int, recipe: RecallRecipe, _index: int) -> Document:
    """RULER's chain of variable assignments among filler, after a solved example."""
    texts = recipe.texts
    example, solved = _chain(numbers, 1, recipe)
    document, outputs = _chain(numbers, size, recipe)
    shown = texts.space.join([example["input"], example["gen_prefix"], " ".join(solved)])
    return {**document, "input": f"{shown}\n\n{document['input']}", "outputs": outputs}


def _chain(numbers: random.Random, size: int, recipe: RecallRecipe) -> tuple[Document, list[str]]:
    texts = recipe.texts
    names = [name.upper() for name in _keys(numbers, _HOPS + 1, texts, texts.variable_length)]
    value = str(numbers.randint(10000, 99999))
    links = [texts.chain[0].format(names[0], value)]
    links += [texts.chain[1].format(name, before) for before, name in itertools.pairwise(names)]
    sentences = [texts.noise] * size if recipe.filler is None else _filler(numbers, size, recipe)
    for offset, place in enumerate(sorted(numbers.choices(range(len(sentences) + 1), k=len(links)))):
        sentences.insert(place + offset, links[offset])
    return _asked(texts.variables, context="\n".join(sentences), query=value, count=len(names)), names


def _who_likes_what(numbers: random.Random, size: int, _recipe: RecallRecipe, _index: int) -> Document:
    """The question for tiny_llama and tiny_llamba, with at most 24 people.

    For a larger `size`, sentences about people who are not asked for are repeated.
    """
    import torch

    generator = torch.Generator().manual_seed(numbers.getrandbits(62))
    (question,) = people.questions(1, min(size, len(people.NAMES)), generator)
    *sentences, asked = question.context.split(f" {people.STOP} ")
    others = [sentence for sentence in sentences if not sentence.startswith(asked)]
    sentences += numbers.choices(others, k=size - len(sentences))
    if size > len(people.NAMES):
        numbers.shuffle(sentences)
    right = question.choices[question.answer]
    wrong = [choice for choice in question.choices if choice != right]
    text = f" {people.STOP} ".join([*sentences, asked])
    return {"input": text, "outputs": [right], "choices": [right, *wrong]}


def _asked(template: tuple[str, str], **fields: Any) -> Document:
    question, beginning = template
    return {"input": question.format(**fields), "gen_prefix": beginning.format(**fields)}


def _filler(numbers: random.Random, size: int, recipe: RecallRecipe) -> list[str]:
    if recipe.filler is not None:
        return recipe.filler[:size]
    texts = recipe.texts
    return [numbers.choice(texts.filler).format(*numbers.sample(texts.nouns, 2)) for _ in range(size)]


def _phrases(texts: Texts) -> list[str]:
    joint = "-" if texts.space else "的"
    return [f"{adjective}{joint}{noun}" for adjective in texts.adjectives for noun in texts.nouns]


def _keys(numbers: random.Random, count: int, texts: Texts, length: int) -> list[str]:
    """`count` different words of random letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(numbers.choices(texts.letters, k=length))] = None
    return list(found)


def _values(numbers: random.Random, count: int, digits: int = 7) -> list[str]:
    return [str(numbers.randint(10 ** (digits - 1), 10**digits - 1)) for _ in range(count)]


def _four(numbers: random.Random, right: str, values: Any) -> list[str]:
    """The right value, and up to three other values of the document."""
    others = sorted({value for value in values if value != right})
    return [right, *numbers.sample(others, min(_CHOICES - 1, len(others)))]


def _maker(name: str) -> _Maker:
    return _MAKERS.get(name) or _MAKERS[root_of(name)]


_PEOPLE = _Maker(_who_likes_what, 2, until=(people.STOP,), least=_LEAST_PEOPLE)
_NEEDLE = _Maker(_needles(), 128, has_filler=True, prompt="one_needle")
_SOME = replace(_NEEDLE, least=_NEEDLES, prompt="needles")
_MAKERS = {
    "kv_retrieval": _Maker(_kv_retrieval, 16, until=("\n",), has_choices=True, least=_CHOICES, prompt="kv"),
    "niah_single": _NEEDLE,
    "niah_multikey": replace(_NEEDLE, make=_needles(keys=_NEEDLES), has_choices=True, least=_NEEDLES),
    "niah_multivalue": replace(_SOME, make=_needles(values=_NEEDLES)),
    "niah_multiquery": replace(_SOME, make=_needles(keys=_NEEDLES, queries=_NEEDLES)),
    "variable_tracking": _Maker(_variable_tracking, 30, has_filler=True, prompt="variables"),
    "mqar": _Maker(_mqar, 8, until=("\n",), has_choices=True, least=2 * _QUERIES, sharing=_QUERIES),
    EMBEDDED_RECALL: _PEOPLE,
    EMBEDDED_RECALL + GENERATED: _PEOPLE,
}
