"""The answers of many grafts that share hidden states. They equal the answers of each graft alone, bit for bit.

A graft equals its base up to its lowest grafted layer. So it starts from the base's hidden states before that layer,
which are computed once. Grafts that are also alike in later layers share these layers too (layer_sets.py). Every layer
runs as when `ScoringLM` runs the whole graft: on the same batches, with the same arguments, and with the same cache of
the tokens that all prompts begin with. In the last layer, the MLP runs on the scored positions only, if this changes no
bit.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from model_preparation.evaluation.prefix_cache import shared_layer
from model_preparation.evaluation.scoring_lm import answers_of
from model_preparation.llamba.cache_llamba import CACHE_NAME, LlambaCache, MambaStateLayer
from model_preparation.search.hidden_states import HiddenStates
from model_preparation.search.layer_sets import BASE, LayerSet, walk
from model_preparation.search.objective import divergence
from model_preparation.search.question_set import BatchResult, QuestionSet
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.settings import KL

Results = dict[int, BatchResult]  # by batch

# With fewer rows than this, torch may sum in another order than with many rows.
_MIN_ROWS = 16
_MAX_KEPT_ARGUMENTS = 256


@dataclass
class _Hidden:
    """Hidden states between two layers: (1, tokens, d_model) per prefix, (rows, length, d_model) per batch."""

    prefixes: dict[int, Tensor]
    batches: dict[int, Tensor]


class SharedScorer:
    """Computes the answers of sets of layers.

    Args:
        setup: models, questions and settings.
        chosen: indices of the batches that this scorer runs; by default all.

    Attributes:
        layer_passes: how many layers have run over all questions. A run over some questions counts as a fraction of 1.
    """

    def __init__(self, setup: ScoringSetup, chosen: Sequence[int] | None = None):
        self._setup = setup
        self._pair = setup.pair
        self._questions = setup.questions
        self._chosen = list(range(len(setup.questions.batches))) if chosen is None else list(chosen)
        self._references = setup.references(self._chosen) if setup.settings.objective == KL else None
        self._store: HiddenStates | None = None
        self._arguments: dict[tuple[int, int, int], dict[str, dict]] = {}
        self._is_exact: dict[tuple[bool, torch.Size, torch.Size], bool] = {}
        self._all_tokens = count_tokens(setup.questions)
        self._tokens_run = 0

    @property
    def layer_passes(self) -> float:
        return self._tokens_run / self._all_tokens

    def donor_answers(self) -> Results:
        """The donor's own answers to all of `chosen`."""
        return self._setup.donor_answers(self._chosen)

    @torch.inference_mode()
    def base(self) -> Results:
        """The base's answers to all of `chosen`. The base's hidden states are kept for `score`."""
        settings = self._setup.settings
        size_bytes = hidden_states_bytes(self._setup, self._chosen)
        self._store = HiddenStates(settings.memory_bytes, size_bytes, settings.folder)
        results: Results = {}
        for prefix, batches in self._by_prefix(self._chosen).items():
            # One prefix after the other, so that few hidden states are in memory in addition to the stored ones.
            hidden: Any = self._embedded(prefix, batches)
            for layer in range(self._pair.layers):
                for number, states in hidden.prefixes.items():
                    self._store.put(layer, -1 - number, states)  # numbers from 0 on are batches
                for number, states in hidden.batches.items():
                    self._store.put(layer, number, states)
                hidden = self._step(layer, BASE, hidden)
            results |= hidden  # the last step gives answers
        return results

    def score(
        self, sets: Iterable[LayerSet], batches: Sequence[int] | None = None
    ) -> Iterator[tuple[LayerSet, Results]]:
        """Yield each set with its answers, as soon as they are known. Sets that share layers follow each other.

        It runs the base first, unless the base has run.

        Args:
            sets: distinct, none of them empty.
            batches: which batches of `chosen` to run; by default all.
        """
        if self._store is None:
            self.base()
        wanted = self._chosen if batches is None else list(batches)
        pair = self._pair
        walked = walk(sets, pair.layers, lambda layer: self._base_state(layer, wanted), self._step, pair.units)
        while True:
            with torch.inference_mode():  # not around the yield, where it would also hold for the caller
                found: Any = next(walked, None)
            if found is None:
                return
            yield found

    def _by_prefix(self, batches: Iterable[int]) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for number in batches:
            found.setdefault(self._questions.batches[number].prefix, []).append(number)
        return found

    def _embedded(self, prefix: int, batches: Sequence[int]) -> _Hidden:
        embedding = self._pair.model.backbone.embedding
        device = embedding.weight.device
        tokens = self._questions.prefixes[prefix]
        prefixes = {prefix: embedding(torch.tensor([tokens], device=device))} if tokens else {}
        inputs = {number: self._questions.batches[number].inputs for number in batches}
        return _Hidden(prefixes, {number: embedding(each.to(device)) for number, each in inputs.items()})

    def _base_state(self, layer: int, batches: Sequence[int]) -> _Hidden:
        assert self._store is not None
        device = self._pair.model.device
        prefixes = [prefix for prefix in self._by_prefix(batches) if self._questions.prefixes[prefix]]
        return _Hidden(
            {prefix: self._store.get(layer, -1 - prefix, device) for prefix in prefixes},
            {number: self._store.get(layer, number, device) for number in batches},
        )

    def _step(self, index: int, part: LayerSet, before: _Hidden) -> Any:
        """Run a layer with the units in `part`. Returns the hidden states; after the last layer, the answers."""
        grafted = bool(part) or index in self._pair.fixed
        layer = self._pair.layer(index, part)
        cache_class = type(LlambaCache(self._pair.model.config).layers[index]) if grafted else MambaStateLayer
        is_last = index == self._pair.layers - 1
        after = _Hidden({}, {})
        results: Results = {}
        for prefix, batches in self._by_prefix(before.batches).items():
            length = len(self._questions.prefixes[prefix])
            filled: DynamicLayer | MambaStateLayer | None = None
            if length:
                states = before.prefixes[prefix]
                filled = cache_class()
                after.prefixes[prefix] = layer(states, **self._layer_arguments(index, grafted, states, filled, 0))
                self._tokens_run += length
            for number in batches:
                states = before.batches[number]
                cache = None if filled is None else shared_layer(filled, len(states))
                given = self._layer_arguments(index, grafted, states, cache, length)
                self._tokens_run += states.shape[:-1].numel()
                if is_last:
                    results[number] = self._answer(number, self._last(number, layer, grafted, states, given))
                else:
                    after.batches[number] = layer(states, **given)
        return results if is_last else after

    def _layer_arguments(
        self, index: int, grafted: bool, states: Tensor, cache: DynamicLayer | MambaStateLayer | None, past: int
    ) -> dict[str, Any]:
        """A layer's arguments other than the hidden states, for tokens that come after `past` earlier tokens."""
        rows, length, _ = states.shape
        if (rows, length, past) not in self._arguments:
            if len(self._arguments) >= _MAX_KEPT_ARGUMENTS:
                self._arguments.clear()
            backbone = self._pair.model.backbone
            seen = None if cache is None else _CacheLength(backbone.config, past)
            self._arguments[rows, length, past] = backbone.layer_arguments(states, cache=seen)
        arguments = self._arguments[rows, length, past]
        kind = self._pair.model.config.layer_types[index] if grafted else "linear_attention"
        return {
            CACHE_NAME: None if cache is None else _OneLayer(index, cache),
            "use_cache": cache is not None,
            **(arguments.get(str(index), arguments[kind]) if grafted else arguments[kind]),
        }

    def _last(self, number: int, layer: Any, grafted: bool, states: Tensor, given: dict[str, Any]) -> Tensor:
        """Run the last layer and the final norm: hidden states at the scored positions, (rows, kept, d_model)."""
        positions = self._questions.batches[number].positions.to(states.device)
        rows = torch.arange(len(states), device=states.device)[:, None]
        norm = self._pair.model.backbone.final_layernorm
        key = (grafted, states.shape, positions.shape)
        exact = self._is_exact.get(key)
        if exact is not False:
            mixed = _mix(layer, states, given)[rows, positions]  # (rows, kept, d_model)
            kept = mixed.flatten(0, 1)
            if len(kept) < _MIN_ROWS:
                kept = torch.cat([kept, kept[-1:].expand(_MIN_ROWS - len(kept), -1)])
            kept = norm(kept + layer.mlp(layer.post_attention_layernorm(kept)))
            short = kept[: mixed.shape[0] * mixed.shape[1]].view_as(mixed)
            if exact:
                return short
        whole = norm(layer(states, **given))[rows, positions]
        if exact is None:
            # Whether both ways give the same bits depends on the shapes only, so each shape is compared once.
            self._is_exact[key] = torch.equal(short, whole)
        return whole

    def _answer(self, number: int, final: Tensor) -> BatchResult:
        batch = self._questions.batches[number]
        model = self._pair.model
        logits = model.lm_head(final)[..., : model.config.vocab_size]
        scores = self._setup.lm.normalised(logits, batch.rows)
        answers = answers_of(batch.rows, scores, self._questions.tokens(batch.task))
        if self._references is None:
            return BatchResult(answers, None)
        pairs = zip(self._references(number), scores, strict=True)
        divergences = [divergence(donors.to(ours), ours) for donors, ours in pairs]
        return BatchResult(answers, torch.stack(divergences).tolist())


def hidden_states_bytes(setup: ScoringSetup, batches: Sequence[int] | None = None) -> int:
    """The bytes of the base's hidden states before all layers, for all batches or some."""
    model = setup.pair.model
    itemsize = model.backbone.embedding.weight.element_size()
    return setup.pair.layers * count_tokens(setup.questions, batches) * model.config.d_model * itemsize


def count_tokens(questions: QuestionSet, batches: Sequence[int] | None = None) -> int:
    """How many tokens every layer runs over, with padding, for all batches or some."""
    chosen = [questions.batches[number] for number in batches] if batches is not None else questions.batches
    prefixes = {batch.prefix for batch in chosen}
    return sum(batch.inputs.numel() for batch in chosen) + sum(len(questions.prefixes[each]) for each in prefixes)


def _mix(layer: Any, states: Tensor, given: dict[str, Any]) -> Tensor:
    """The first half of a layer: attention or mixer, in which positions see each other, with the residual."""
    normed = layer.input_layernorm(states)
    if hasattr(layer, "self_attn"):
        return states + layer.self_attn(hidden_states=normed, **given)[0]
    mixed = layer.mixer(normed, given[CACHE_NAME], given["attention_mask"])
    if layer.attention is not None:
        mixed = mixed + layer.attention(states, cache=given[CACHE_NAME], **given["of_heads"])
    return states + mixed


class _CacheLength(LlambaCache):
    """An empty cache that claims to hold `tokens` tokens: masks and positions need only this number."""

    def __init__(self, config: Any, tokens: int):
        super().__init__(config)
        self.seen_tokens = tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0


class _OneLayer:
    """A cache for a single layer, with the methods that the layer calls."""

    def __init__(self, index: int, layer: DynamicLayer | MambaStateLayer):
        self.layers = {index: layer}

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.layers[layer_idx].update(keys, values, *args, **kwargs)
