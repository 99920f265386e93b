"""lm-eval's Hugging Face model, with the same answers in less time.

If all questions of a task begin with the same tokens (description, solved examples), the model runs these tokens once.
Only the positions that are scored go through the head. lm-eval itself runs every whole prompt, and computes the logits
of all positions. batched_generation.py generates texts. A prompt that is too long is an error, unless it may be cut.
Source of the computation: lm_eval/models/huggingface.py, HFLM._loglikelihood_tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.batched_generation import can_write, write
from model_preparation.evaluation.prefix_cache import can_share, shared
from model_preparation.llamba.cache_llamba import CACHE_NAME
from model_preparation.llamba.modeling_llamba import LlambaForCausalLM

Answer = tuple[float, bool]  # log-likelihood of the continuation, whether greedy decoding gives the continuation

# A shorter common beginning saves less time than its cache costs.
MIN_PREFIX_TOKENS = 8
# `batch_size="auto"`: the most rows, and the most tokens with padding, per forward pass.
AUTO_ROWS = 64
AUTO_TOKENS = {"cpu": 512, "cuda": 32_768}
# The most tokens per batch of generated texts. These limits are higher than AUTO_TOKENS, because each step of
# generation reads the weights once for all rows.
WRITING_TOKENS = {"cpu": 16_384, "cuda": 131_072}


@dataclass
class Row:
    """A sequence to run, and the indices of the requests that it answers."""

    tokens: tuple[int, ...]  # the context, and the continuation without its last token
    scored: int = 1  # how many of the last positions are scored
    requests: list[int] = field(default_factory=list)


class ScoringLM(HFLM):
    """An `HFLM` that answers `loglikelihood` and `generate_until` faster.

    Args:
        model: on its device, in its dtype.
        tokenizer: the model's.
        batch_size: rows per forward pass; "auto" starts with `AUTO_ROWS` and halves them when memory runs out.
        advance: called with the number of requests just answered.
        batches_for: the kind of device for which "auto" chooses batch sizes; by default the model's.
        allow_truncation: cut off the beginning of prompts that are too long, as lm-eval does. If false, such
            prompts are an error.

    Attributes:
        truncated: how many prompts were cut.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | str = "auto",
        advance: Callable[[int], None] = lambda count: None,
        batches_for: str | None = None,
        allow_truncation: bool = False,
    ):
        self._auto = batch_size == "auto"
        # lm-eval's own search for a batch size would run the longest possible sequence and compute all its logits.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=8 if self._auto else batch_size)
        self._rows_at_once = AUTO_ROWS if self._auto else int(batch_size)
        self._advance = advance
        self._allow_truncation = allow_truncation
        self.truncated = 0
        self._task = ""  # the task of the current requests
        self._tokens_at_once = AUTO_TOKENS.get(batches_for or self.device.type, AUTO_TOKENS["cuda"])
        self._encoded: tuple[str, list[int]] = ("", [])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The tokens of a text. The last result is kept, because every choice of a question has the same context."""
        if add_special_tokens is not None or kwargs:
            return super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)
        if string != self._encoded[0]:
            self._encoded = (string, super().tok_encode(string))
        return list(self._encoded[1])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of context and continuation, as lm-eval makes them. `tok_encode` keeps only those of the context."""
        stripped = context.rstrip()
        whole = super().tok_encode(context + continuation)
        context_tokens = self.tok_encode(stripped)
        return context_tokens, whole[len(context_tokens) :]

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        self._task = str(requests[0].task_name)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts = dict(answer for batch in self.texts(requests) for answer in batch)
        return [texts[index] for index in range(len(requests))]

    def texts(self, requests: Sequence[Instance]) -> Iterator[list[tuple[int, str]]]:
        """Answer `generate_until` requests. Yields a list of (index of the request, text) for each batch."""
        self._task = str(requests[0].task_name)
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(index)
        for indices in by_settings.values():
            prompts = [self.tok_encode(requests[index].args[0]) for index in indices]
            settings = normalize_gen_kwargs(dict(requests[indices[0]].args[1]), self.max_gen_toks)
            room = self.max_length - settings["max_gen_toks"]
            if room <= 0:
                raise SurgeryError(
                    f"{self._task} asks for {settings['max_gen_toks']} new tokens, but the model takes sequences of "
                    f"at most {self.max_length}. Choose other --tasks."
                )
            self._count_too_long([len(prompt) for prompt in prompts], room)
            if not can_write(self.model, settings):
                chosen = [requests[index] for index in indices]
                yield list(zip(indices, super().generate_until(chosen, disable_tqdm=True), strict=True))
                self._advance(len(indices))
                continue
            for batch, texts in self._written([prompt[-room:] for prompt in prompts], settings):
                yield [(indices[place], text) for place, text in zip(batch, texts, strict=True)]
                self._advance(len(batch))

    @torch.inference_mode()
    def _written(self, prompts: list[list[int]], settings: dict) -> Iterator[tuple[list[int], list[str]]]:
        """Answer prompts in batches of similar lengths, longest first; yields (indices of prompts, their new texts)."""
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        tokens_at_once = WRITING_TOKENS.get(self.device.type, WRITING_TOKENS["cuda"])
        while order:
            batch = order[: self._fitting(len(prompts[order[0]]) + settings["max_gen_toks"], tokens_at_once)]
            try:
                with self._autocast():
                    chosen = [prompts[place] for place in batch]
                    texts = write(self.model, self.tokenizer, chosen, settings, self._tokens_at_once)
            except torch.OutOfMemoryError:
                self._halve(len(batch))
                continue
            order = order[len(batch) :]
            yield batch, texts

    def _count_too_long(self, lengths: Sequence[int], most: int) -> None:
        """Count the prompts that are too long. Raise SurgeryError if there are any and cutting is not allowed."""
        too_long = [length for length in lengths if length > most]
        if too_long and not self._allow_truncation:
            raise SurgeryError(
                f"{len(too_long)} of {len(lengths)} prompts of {self._task} are too long for the model: the longest "
                f"has {max(too_long)} tokens, and {most} fit. Choose other --tasks, fewer --num_fewshot or shorter "
                "--lengths; --allow_truncation of test_checkpoint.py cuts such prompts on the left."
            )
        self.truncated += len(too_long)

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """Answer requests ((context, continuation), context tokens, continuation tokens), in their order."""
        answers: list[Answer | None] = [None] * len(requests)
        for group, prefix in self.groups(requests):
            for batch, scores in self._scores(group, prefix):
                for index, answer in answers_of(batch, scores, requests):
                    answers[index] = answer
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                self._advance(sum(len(row.requests) for row in batch))
        return answers

    def groups(self, requests: Sequence[tuple]) -> Iterator[tuple[list[Row], tuple[int, ...]]]:
        """Yields groups of rows that answer the requests. Each comes with the tokens that all its rows begin with."""
        lengths = [len(context) + len(continuation) for _texts, context, continuation in requests]
        self._count_too_long(lengths, self.max_length + 1)  # the last token is scored, but the model does not read it
        rows: dict[tuple[int, ...], Row] = {}
        for index, (_texts, context, continuation) in enumerate(requests):
            # As in lm-eval: a long sequence loses tokens on the left, and choices that are one token long share a row.
            # Unlike in lm-eval, a row may also serve continuations of different lengths.
            tokens = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            if len(continuation) > len(tokens):
                raise SurgeryError(
                    f"A continuation has {len(continuation)} tokens, but the model takes sequences of "
                    f"at most {self.max_length}. Choose other --tasks."
                )
            row = rows.setdefault(tokens, Row(tokens))
            row.scored = max(row.scored, len(continuation))
            row.requests.append(index)
        return self._with_prefixes(list(rows.values()))

    def _with_prefixes(self, rows: list[Row]) -> Iterator[tuple[list[Row], tuple[int, ...]]]:
        """Yields rows that may have lost tokens on the left, without a prefix; then all others, with their prefix."""
        cut = [row for row in rows if len(row.tokens) >= self.max_length]
        whole = [row for row in rows if len(row.tokens) < self.max_length]
        if cut:
            yield cut, ()
        if whole:
            # In sorted order, a beginning that the first and the last row share is common to all rows.
            first, last = min(row.tokens for row in whole), max(row.tokens for row in whole)
            same = [one == other for one, other in zip(first, last, strict=False)]
            common = same.index(False) if False in same else len(same)
            # The prefix ends before the first scored position of every row.
            length = min(common, *(len(row.tokens) - row.scored for row in whole))
            long_enough = length >= MIN_PREFIX_TOKENS and len(whole) > 1
            yield whole, first[:length] if long_enough else ()

    def _scores(self, rows: list[Row], prefix: Sequence[int]) -> Iterator[tuple[list[Row], list[Tensor]]]:
        """Yields batches of rows, with log-probabilities (scored positions, vocabulary) for each row."""
        cache = self.prefix_cache(prefix) if prefix else None
        skipped = len(prefix) if cache is not None else 0
        rows = longest_first(rows)
        while rows:
            batch = self.next_batch(rows, skipped)
            try:
                scores = self.log_probabilities(batch, skipped, cache)
            except torch.OutOfMemoryError:
                self._halve(len(batch))
                continue
            yield batch, scores
            rows = rows[len(batch) :]

    def next_batch(self, rows: list[Row], skipped: int) -> list[Row]:
        """As many of the first rows as run at once. The first `skipped` tokens of each row ran before."""
        return rows[: self._fitting(len(rows[0].tokens) - skipped, self._tokens_at_once)]

    def _fitting(self, longest: int, tokens_at_once: int) -> int:
        """How many rows run at once, if the longest has `longest` tokens."""
        return max(1, min(self._rows_at_once, tokens_at_once // longest)) if self._auto else self._rows_at_once

    def _halve(self, rows: int) -> None:
        """Memory ran out: run fewer rows at once from now on. If that is not possible, raise the memory error again."""
        if not self._auto or rows == 1:
            raise
        self._rows_at_once = rows // 2
        torch.cuda.empty_cache()

    def prefix_cache(self, prefix: Sequence[int]) -> Cache | None:
        """The model's cache after the prefix; None if rows cannot share that kind of cache."""
        tokens = torch.tensor([prefix], device=self.device)
        with self._autocast():
            cache = self.model(tokens, use_cache=True, logits_to_keep=1)[CACHE_NAME]
        return cache if can_share(cache) else None

    def log_probabilities(self, batch: list[Row], skipped: int, prefix: Cache | None) -> list[Tensor]:
        """Log-probabilities at each row's scored positions, (scored, vocabulary), in lm-eval's dtype."""
        inputs, positions = padded(batch, skipped)
        inverse = None
        if not isinstance(self.model, LlambaForCausalLM):  # other models take one list of positions for all rows
            positions, inverse = positions.unique(return_inverse=True)
        with self._autocast():
            logits = self.model(
                inputs.to(self.device),
                **{CACHE_NAME: None if prefix is None else shared(prefix, len(batch))},
                use_cache=prefix is not None,
                logits_to_keep=positions.to(self.device),
            ).logits
        if inverse is not None:
            logits = logits[torch.arange(len(batch))[:, None], inverse]
        return self.normalised(logits, batch)

    def normalised(self, logits: Tensor, batch: list[Row]) -> list[Tensor]:
        """Log-probabilities at each row's scored positions, (scored, vocabulary).

        Args:
            logits: at the last positions of each row, (rows, kept, vocabulary).
            batch: the rows.
        """
        scores = F.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)  # (rows, kept, vocabulary)
        return [scored[len(scored) - row.scored :] for scored, row in zip(scores, batch, strict=True)]

    def _autocast(self) -> torch.autocast:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)


def longest_first(rows: list[Row]) -> list[Row]:
    """The rows in the order in which batches are made: the longest first."""
    return sorted(rows, key=lambda row: -len(row.tokens))


def padded(batch: list[Row], skipped: int) -> tuple[Tensor, Tensor]:
    """A batch's tokens after the first `skipped`, (rows, length) int64, and each row's last positions, (rows, kept).

    `kept` is the largest number of scored positions of any row.
    """
    tokens = [row.tokens[skipped:] for row in batch]
    lengths = [len(row) for row in tokens]
    # Padding on the right needs no mask, because no position sees what comes after it.
    inputs = torch.zeros(len(batch), max(lengths), dtype=torch.long)
    for index, row in enumerate(tokens):
        inputs[index, : len(row)] = torch.tensor(row)
    kept = max(row.scored for row in batch)
    return inputs, (torch.tensor(lengths)[:, None] + torch.arange(-kept, 0)).clamp(min=0)


def answers_of(batch: list[Row], scores: list[Tensor], requests: Sequence[tuple]) -> list[tuple[int, Answer]]:
    """(index of the request, answer) for all requests of a batch; copied from the device together."""
    indices, sums, greedy = [], [], []
    for row, score in zip(batch, scores, strict=True):
        best = score.argmax(dim=-1)  # (scored,)
        for index in row.requests:
            continuation = torch.tensor(requests[index][2], device=score.device)
            last = slice(score.shape[0] - len(continuation), None)
            indices.append(index)
            sums.append(score[last].gather(1, continuation[:, None]).sum())
            greedy.append((best[last] == continuation).all())
    likelihoods, are_greedy = torch.stack(sums).tolist(), torch.stack(greedy).tolist()
    return list(zip(indices, zip(likelihoods, are_greedy, strict=True), strict=True))
