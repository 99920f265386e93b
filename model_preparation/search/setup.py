"""Everything that scoring takes, from a description that a worker on another machine can be sent.

In: a `Spec`. Out: a `Setup`: base and donor in memory, the questions, and what scores sets of layers.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model_preparation.checkpoint import graft
from model_preparation.checkpoint.digests import digest_of_layers, digest_of_model, digest_of_tokenizer
from model_preparation.checkpoint.layer_store import LayerStore, ModelLayers
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.evaluate import settings_of
from model_preparation.evaluation.models import OtherModel, load_other
from model_preparation.evaluation.scoring import Answer, ScoringLM, answers_of
from model_preparation.evaluation.settings import EvaluationSettings
from model_preparation.evaluation.tasks import load_tasks, quiet
from model_preparation.hub.sources import donor_name, resolve
from model_preparation.search.boundaries import BoundaryStore
from model_preparation.search.cached_scoring import CachedScorer, References
from model_preparation.search.objective import KL
from model_preparation.search.pair import load_pair
from model_preparation.search.question_set import BatchResult, QuestionSet


@dataclass(frozen=True)
class Spec:
    """What is searched and on what.

    Attributes:
        base, tokenizer, sources: as `graft.plan` takes them.
        llama_layers_dir: a folder written by `extract_layers`; None for the layers in the donor's own files.
        donor: the donor as a model, what `resolve` takes; needed for `kl`, for the donor's own score, and where no
            layers are given.
        tasks, limit, mmlu_data, num_fewshot, batch_size: as `evaluate_checkpoint` takes them.
        device: where candidates run.
        device_here: where this process runs what it has to itself, if elsewhere than candidates run.
        dtype: torch's name of it; by default that of the checkpoints that would be built.
        objective: one of `OBJECTIVES`.
        memory_bytes: for the base's hidden states; what is more goes into a file in `folder`.
    """

    base: str
    llama_layers_dir: str | None
    tasks: tuple[str, ...]
    folder: str
    donor: str | None = None
    tokenizer: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    mmlu_data: str | None = None
    num_fewshot: int | None = None
    batch_size: int | str = "auto"
    device: str = "cpu"
    device_here: str | None = None
    dtype: str | None = None
    objective: str = "accuracy"
    memory_bytes: int = 4_000_000_000


class Setup:
    """What a `Spec` describes.

    Attributes:
        planned: the graft of all layers.
        settings: what decides on answers beside the weights.

    Raises:
        SurgeryError: as `graft.plan`, `load_tasks` and `QuestionSet`.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        self._kept_references: References | None = None
        self.planned = _plan(spec)
        loaded = load_tasks(spec.tasks, mmlu_data=spec.mmlu_data, num_fewshot=spec.num_fewshot)
        dtype = None if spec.dtype is None else getattr(torch, spec.dtype)
        asked = EvaluationSettings(limit=spec.limit, num_fewshot=spec.num_fewshot, batch_size=spec.batch_size)
        self.settings: dict[str, Any] = {
            **settings_of(loaded, asked),
            "device": torch.device(spec.device).type,
            "dtype": str(dtype or self.planned.dtype).removeprefix("torch."),
        }
        self._here = spec.device_here or spec.device
        self.pair = load_pair(self.planned, self._here, dtype)
        with quiet():
            kind = self.settings["device"]  # the same batches on every machine
            self.lm = ScoringLM(self.pair.model, self.pair.tokenizer, spec.batch_size, batches_for=kind)
            self.questions = QuestionSet(self.lm, loaded, self.settings)

    def take_extracted(self, folder: Path) -> None:
        """Go on with the donor's layers that were extracted into `folder`; those in memory are the same."""
        self.spec = replace(self.spec, llama_layers_dir=str(folder))
        self.planned = _plan(self.spec)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """What the answers are computed from, beside the settings, by digests."""
        donor = None
        if self.spec.donor is not None:
            donor = digest_of_model(resolve(self.spec.donor, overrides=self.spec.sources).folder)
        return {
            "base": digest_of_model(self.planned.base.folder),
            "donor": donor,
            "donor_layers": digest_of_layers(self.planned.donor, self.planned.layers),
            "tokenizer": digest_of_tokenizer(self.pair.tokenizer),
            "questions": self.questions.digest,
        }

    def scorer(self, chosen: Sequence[int] | None = None) -> CachedScorer:
        """What scores sets of layers on all batches, or on `chosen` ones."""
        references = self._references(chosen or self._all) if self.spec.objective == KL else None
        return CachedScorer(
            self.pair,
            self.lm,
            self.questions,
            chosen=chosen,
            memory_bytes=self.spec.memory_bytes,
            folder=Path(self.spec.folder),
            references=references,
            donor_answers=lambda: self.donor_answers(chosen or self._all),
        )

    @property
    def _all(self) -> range:
        return range(len(self.questions.batches))

    def _references(self, numbers: Sequence[int]) -> References:
        """The donor's log-probabilities for a batch, kept as the base's hidden states are."""
        if self._kept_references is not None and len(numbers) == len(self._all):
            return self._kept_references
        vocabulary = self.pair.model.config.vocab_size
        scored = {number: [row.scored for row in self.questions.batches[number].rows] for number in numbers}
        size_bytes = sum(map(sum, scored.values())) * vocabulary * 4
        store = BoundaryStore(self.spec.memory_bytes, size_bytes, Path(self.spec.folder))
        for number, scores in self._donor_scores(numbers):
            store.put(0, number, torch.cat(scores).float())
        cpu = torch.device("cpu")
        self._kept_references = lambda number: list(store.get(0, number, cpu).split(scored[number]))
        return self._kept_references

    def donor_answers(self, chosen: Sequence[int]) -> dict[int, BatchResult]:
        """What the donor itself answers, by batch, to `chosen` ones."""
        if self.spec.objective == KL:  # they are needed anyway
            references = self._references(chosen)
            all_scores: Iterable[tuple[int, list[Tensor]]] = ((number, references(number)) for number in chosen)
        else:
            all_scores = self._donor_scores(chosen)
        found = {}
        for number, scores in all_scores:
            batch = self.questions.batches[number]
            answers: list[tuple[int, Answer]] = answers_of(batch.rows, scores, self.questions.tokens(batch.task))
            found[number] = BatchResult(answers, [0.0] * len(batch.rows))
        return found

    @torch.inference_mode()
    def _donor_scores(self, batches: Sequence[int]) -> Iterator[tuple[int, list[Tensor]]]:
        """(batch, the donor's log-probabilities for it, (scored, vocabulary) per row)."""
        assert self.spec.donor is not None
        folder = resolve(self.spec.donor, overrides=self.spec.sources).folder
        dtype = self.pair.model.dtype
        other = OtherModel("donor", folder, is_checkpoint=False)
        model, _ = load_other(other, self.pair.tokenizer, device=self._here, dtype=dtype)
        if model.config.model_type != "llama" or model.config.num_hidden_layers != self.pair.layers:
            raise SurgeryError(
                f"{folder} is a {model.config.model_type} of {model.config.num_hidden_layers} layers, the base has "
                f"{self.pair.layers}. Give the donor that {self.planned.donor.folder} comes from by --donor."
            )
        with quiet():
            lm = ScoringLM(model, self.pair.tokenizer, self.spec.batch_size)
        vocabulary = self.pair.model.config.vocab_size
        cache, of_prefix = None, None
        for number in batches:
            batch = self.questions.batches[number]
            prefix = self.questions.prefixes[batch.prefix]
            if batch.prefix != of_prefix:
                cache, of_prefix = (lm.prefix_cache(prefix) if prefix else None), batch.prefix
            scores: list[Tensor] = lm.log_probabilities(batch.rows, len(prefix), cache)
            yield number, [score[:, :vocabulary].cpu() for score in scores]


def _plan(spec: Spec) -> graft.GraftPlan:
    """The graft of all layers."""
    if spec.llama_layers_dir is not None:
        layers = LayerStore(spec.llama_layers_dir, hint=spec.donor or donor_name(spec.base, spec.sources))
    else:
        assert spec.donor is not None
        layers = ModelLayers(resolve(spec.donor, overrides=spec.sources))
    return graft.plan(
        spec.base,
        range(layers.config.num_hidden_layers),
        layers,
        tokenizer=spec.tokenizer,
        sources=spec.sources,
    )
