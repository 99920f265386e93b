"""Everything that scoring needs. It is made from the settings alone, so a worker on another machine makes the same."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_preparation.checkpoint.checkpoint_info import read_info
from model_preparation.checkpoint.graft_plan import GraftPlan, plan
from model_preparation.checkpoint.layer_store import LayerStore, ModelLayers
from model_preparation.checkpoint.model_digests import digest_of_layers, digest_of_model, digest_of_tokenizer
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.evaluate import load_asked, settings_of
from model_preparation.evaluation.models import OtherModel, load_other
from model_preparation.evaluation.scoring_lm import ScoringLM, answers_of
from model_preparation.evaluation.settings import EvaluationSettings
from model_preparation.evaluation.tasks import quiet
from model_preparation.hub.sources import donor_name, resolve
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from model_preparation.search.hidden_states import HiddenStates
from model_preparation.search.model_pair import load_pair
from model_preparation.search.question_set import BatchResult, QuestionSet
from model_preparation.search.settings import HEADS, KL, SearchSettings

# A search passes these settings to the evaluation, which loads its questions.
_OF_QUESTIONS = ("lengths", "language", "haystack", "limit", "mmlu_data", "num_fewshot", "batch_size")
References = Callable[[int], list[Tensor]]  # the donor's log-probabilities for a batch, (scored, vocabulary) per row


class ScoringSetup:
    """Base and donor in memory, the questions, and the donor's own answers.

    Args:
        settings: the search's settings.
        scored_on: the type of the device on which candidates run, if candidates do not run on `settings.device`.

    Attributes:
        planned: the graft of all layers, or of all heads.
        second_leaves: the single tasks of `second_task`.
        recorded: the settings that the answers depend on, as results and journals record them.

    Raises:
        SurgeryError: for the same reasons as `plan`, `load_tasks` and `QuestionSet`.
    """

    def __init__(self, settings: SearchSettings, scored_on: str | None = None):
        self.settings = settings
        self._kept_references: References | None = None
        self.planned = _plan(settings)
        dtype = None if settings.dtype is None else getattr(torch, settings.dtype)
        kind = scored_on or torch.device(settings.device).type
        asked = EvaluationSettings(settings.all_tasks, **{name: getattr(settings, name) for name in _OF_QUESTIONS})
        tokenizer = self.planned.tokenizer
        loaded = load_asked(asked, lambda: load_tokenizer(tokenizer), self.planned.config.max_position_embeddings)
        self.recorded: dict[str, Any] = {
            **settings_of(loaded, asked),
            "device": kind,
            "dtype": str(dtype or self.planned.dtype).removeprefix("torch."),
        }
        self.pair = load_pair(self.planned, settings.device, dtype)
        with quiet():
            # `batches_for` makes the same batches on every machine.
            self.lm = ScoringLM(self.pair.model, self.pair.tokenizer, settings.batch_size, batches_for=kind)
            self.questions = QuestionSet(self.lm, loaded, self.recorded, settings.objective)
        if settings.unit == HEADS:
            self.recorded |= {"unit": HEADS, "keep_mixer_heads": settings.keep_mixer_heads}
        self.second_leaves = [] if settings.second_task is None else loaded.leaves_of[settings.second_task]

    def take_extracted(self, folder: Path) -> None:
        """Plan with the donor's layers in `folder` from now on. The layers in memory are equal to them, and stay."""
        self.settings = replace(self.settings, llama_layers_dir=folder)
        self.planned = _plan(self.settings)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """Digests of the models, the tokenizer and the questions: everything that answers are computed from."""
        donor = None
        if self.settings.donor is not None:
            donor = digest_of_model(resolve(self.settings.donor, overrides=self.settings.sources).folder)
        return {
            "base": digest_of_model(self.planned.base.folder),
            "donor": donor,
            "donor_layers": digest_of_layers(self.planned.donor, self.planned.donor_layers),
            "tokenizer": digest_of_tokenizer(self.pair.tokenizer),
            "questions": self.questions.digest,
        }

    def references(self, numbers: Sequence[int]) -> References:
        """A function that gives the donor's log-probabilities for a batch. They are kept in memory, or in
        a file if memory is short, like the base's hidden states."""
        if self._kept_references is not None and len(numbers) == len(self.questions.batches):
            return self._kept_references
        vocabulary = self.pair.model.config.vocab_size
        scored = {number: [row.scored for row in self.questions.batches[number].rows] for number in numbers}
        size_bytes = sum(map(sum, scored.values())) * vocabulary * 4
        store = HiddenStates(self.settings.memory_bytes, size_bytes, self.settings.folder)
        for number, scores in self._donor_scores(numbers):
            store.put(0, number, torch.cat(scores).float())
        cpu = torch.device("cpu")
        self._kept_references = lambda number: list(store.get(0, number, cpu).split(scored[number]))
        return self._kept_references

    def donor_answers(self, chosen: Sequence[int]) -> dict[int, BatchResult]:
        """The donor's own answers to the batches in `chosen`, by batch."""
        if self.settings.objective == KL:  # the objective kl needs the log-probabilities anyway
            references = self.references(chosen)
            all_scores: Iterable[tuple[int, list[Tensor]]] = ((number, references(number)) for number in chosen)
        else:
            all_scores = self._donor_scores(chosen)
        found = {}
        for number, scores in all_scores:
            batch = self.questions.batches[number]
            answers = answers_of(batch.rows, scores, self.questions.tokens(batch.task))
            found[number] = BatchResult(answers, [0.0] * len(batch.rows))
        return found

    @torch.inference_mode()
    def _donor_scores(self, batches: Sequence[int]) -> Iterator[tuple[int, list[Tensor]]]:
        """Yields each batch with the donor's log-probabilities: a tensor (scored, vocabulary) per row."""
        assert self.settings.donor is not None
        folder = resolve(self.settings.donor, overrides=self.settings.sources).folder
        other = OtherModel("donor", folder, is_checkpoint=False)
        tokenizer = self.pair.tokenizer
        model, _ = load_other(other, tokenizer, device=self.settings.device, dtype=self.pair.model.dtype)
        kind = self.planned.donor.config.model_type
        if model.config.model_type != kind or model.config.num_hidden_layers != self.pair.layers:
            raise SurgeryError(
                f"{folder} is a {model.config.model_type} of {model.config.num_hidden_layers} layers, but a {kind} of "
                f"{self.pair.layers} layers is needed. By --donor, give the model "
                f"that the layers in {self.planned.donor.folder} come from."
            )
        with quiet():
            lm = ScoringLM(model, tokenizer, self.settings.batch_size)
        vocabulary = self.pair.model.config.vocab_size
        cache, of_prefix = None, None
        for number in batches:
            batch = self.questions.batches[number]
            prefix = self.questions.prefixes[batch.prefix]
            if batch.prefix != of_prefix:
                cache, of_prefix = (lm.prefix_cache(prefix) if prefix else None), batch.prefix
            scores: list[Tensor] = lm.log_probabilities(batch.rows, len(prefix) if cache is not None else 0, cache)
            yield number, [score[:, :vocabulary].cpu() for score in scores]


def _plan(settings: SearchSettings) -> GraftPlan:
    """The graft of all layers, or of all heads, except in layers that `settings.start` has grafted already."""
    layers: LayerStore | ModelLayers
    if settings.llama_layers_dir is not None:
        hint = settings.donor or ("DONOR" if settings.start else donor_name(settings.base, settings.sources))
        layers = LayerStore(settings.llama_layers_dir, hint=hint)
    else:
        assert settings.donor is not None
        layers = ModelLayers(resolve(settings.donor, overrides=settings.sources))
    grafted = [] if settings.start is None else read_info(settings.start)["replaced_layers"]
    indices = [index for index in range(layers.config.num_hidden_layers) if index not in grafted]
    asked: dict[str, Any] = {"layers": indices}
    if settings.unit == HEADS:
        layers.check_is_donor()
        heads = range(layers.config.num_attention_heads)
        asked = {"layers": [], "heads": dict.fromkeys(indices, heads), "keep_mixer_heads": settings.keep_mixer_heads}
    return plan(
        settings.origin, llama_layers_dir=layers, tokenizer=settings.tokenizer, sources=settings.sources, **asked
    )
