"""A checkpoint writes, other models beside it, and it is shown and kept.

In: a loaded model and what it is asked for. Out, on the terminal: texts, speeds, peak memory, the others' texts side by
side; in a file, if wanted, one JSON object per text.
"""

import contextlib
import gc
import json
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_preparation import interrupts
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.generation import Generation, generate_text, generate_texts
from model_preparation.evaluation.generation_flags import Request
from model_preparation.evaluation.other_models import OtherModel, load_other
from model_preparation.evaluation.prompts import Prompt, shown
from model_preparation.evaluation.side_by_side import Column, difference, print_side_by_side, printable
from model_preparation.io.complete_file import write_file
from model_preparation.io.progress import bar

THIS = "checkpoint"  # the name of the model tested, beside those it is compared with


@dataclass
class Written:
    """What the checkpoint wrote, per prompt, and the rows of the results file so far."""

    generations: list[list[Generation]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)


def write_and_print(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, request: Request
) -> Written:
    """Let the checkpoint write, print each text with its speed, and the peak memory at the end.

    Raises:
        SurgeryError: as `generate_texts`. The results file has the texts before that, and the error.
    """
    written = Written()
    row = _row(THIS, source, model, request)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    _warm_up(model, tokenizer, request)
    try:
        for prompt in request.prompts:
            generations = _generate(model, tokenizer, prompt, request, written.rows, row)
            _print(prompt, generations)
            written.generations.append(generations)
    finally:
        _save(written.rows, request)
    print(f"\nPeak memory  {_peak_memory(model.device)}", flush=True)
    return written


def compare_and_print(
    written: Written,
    tokenizer: PreTrainedTokenizerBase,
    others: Sequence[OtherModel],
    request: Request,
    *,
    device: str,
    dtype: torch.dtype | None,
    parallelize: bool = False,
) -> None:
    """Let other models write after the same prompts, one model in memory at a time, and print all side by side.

    The caller no longer holds the checkpoint's own model. What goes wrong with another model is told in its place.

    Args:
        written: what the checkpoint wrote; the others' rows are added to it.
        tokenizer: the checkpoint's.
        device, dtype, parallelize: as in `load_other`.
    """
    columns = [Column(THIS, [[item.text for item in generations] for generations in written.generations])]
    try:
        for other in others:
            gc.collect()  # the model before: what refers to itself is not freed at once
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            load = partial(load_other, other, tokenizer, device=device, dtype=dtype, parallelize=parallelize)
            columns.append(_compare(written, tokenizer, other, request, load))
            interrupts.check()
    finally:
        _save(written.rows, request)
    print_side_by_side([shown(prompt) for prompt in request.prompts], columns)


def check_answers(written: Written) -> None:
    """Raise SurgeryError if the checkpoint wrote nothing after some prompt."""
    for generations in written.generations:
        for generation in generations:
            if not generation.text.strip():
                raise SurgeryError(
                    f"The model wrote nothing after {shown(generation.prompt)!r}. Give another --prompt; if it stays "
                    "silent, the layers of a checkpoint do not fit its base."
                )


def _compare(
    written: Written,
    tokenizer: PreTrainedTokenizerBase,
    other: OtherModel,
    request: Request,
    load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
) -> Column:
    row = {"model": other.name, "source": str(other.folder)}
    try:
        model, its_tokenizer = load()
        _warm_up(model, its_tokenizer, request)
    except (SurgeryError, torch.OutOfMemoryError) as error:
        print(f"\nCompared     {other.name}: {other.folder}, not loaded", flush=True)
        written.rows.append({**row, "error": _reason(error)})
        return Column(other.name, [[f"failed: {_reason(error)}"]] * len(request.prompts))
    row = _row(other.name, str(other.folder), model, request)
    size = f"{model.num_parameters():,} parameters, {row['dtype']}"
    print(f"\nCompared     {other.name}: {other.folder}, {size}", flush=True)
    same_tokenizer = its_tokenizer.get_vocab() == tokenizer.get_vocab()
    column, start = Column(other.name, [], []), len(written.rows)
    pairs = list(zip(request.prompts, written.generations, strict=True))
    with bar(other.name, len(pairs)) as advance:
        for prompt, own in pairs:
            try:
                generations = _generate(model, its_tokenizer, prompt, request, written.rows, row)
            except (SurgeryError, torch.OutOfMemoryError) as error:
                column.texts.append([f"failed: {_reason(error)}"])
                column.remarks.append([])
                continue
            finally:
                advance(1)
            column.texts.append([item.text if item.text.strip() else "wrote nothing" for item in generations])
            # Texts drawn at random differ by chance.
            column.remarks.append([] if request.sampling else [difference(own[0], generations[0], same_tokenizer)])
            if request.sampling is None:
                written.rows[-1]["difference"] = column.remarks[-1][0]
    done = [row for row in written.rows[start:] if "text" in row]
    print(f"Prompts read {_rate(done, 'prompt_tokens', 'prefill_seconds', 0)}")
    print(f"Written      {_rate(done, 'new_tokens', 'decode_seconds', 1)}", flush=True)
    return column


def _warm_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: Request) -> None:
    """Load kernels and read weights, so that the first text's speed is that of the others."""
    with contextlib.suppress(SurgeryError):  # what is wrong is told when it counts
        generate_text(model, tokenizer, request.prompts[0], max_new_tokens=2, chat=request.chat)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    request: Request,
    rows: list[dict[str, Any]],
    row: dict[str, Any],
) -> list[Generation]:
    """Generate, and add what came of it to the rows."""
    asked = {"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt}
    try:
        generations = generate_texts(
            model,
            tokenizer,
            prompt,
            max_new_tokens=request.max_new_tokens,
            sampling=request.sampling,
            chat=request.chat,
            count=request.count,
        )
    except (SurgeryError, torch.OutOfMemoryError) as error:
        rows.append({**row, **asked, "error": _reason(error)})
        raise
    for number, generation in enumerate(generations):
        rows.append(
            {
                **row,
                **asked,
                "number": number,
                "text": generation.text,
                "new_ids": generation.new_ids,
                "prompt_tokens": generation.prompt_tokens,
                "new_tokens": generation.new_tokens,
                "prefill_seconds": generation.prefill_seconds,
                "prefill_tokens_per_second": generation.prefill_tokens_per_second,
                "decode_seconds": generation.decode_seconds,
                "decode_tokens_per_second": generation.decode_tokens_per_second,
            }
        )
    return generations


def _row(name: str, source: str, model: PreTrainedModel, request: Request) -> dict[str, Any]:
    """What all rows of a model have in common."""
    sampling = request.sampling
    drawn = None if sampling is None else {name: getattr(sampling, name) for name in sampling.__dataclass_fields__}
    return {
        "model": name,
        "source": source,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "chat": request.chat,
        "max_new_tokens": request.max_new_tokens,
        "sampling": drawn,
    }


def _save(rows: list[dict[str, Any]], request: Request) -> None:
    if request.output is not None:
        write_file(request.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _print(prompt: Prompt, generations: list[Generation]) -> None:
    print(f"\nPrompt       {printable(shown(prompt))}")
    for number, generation in enumerate(generations, start=1):
        label = "Text" if len(generations) == 1 else f"Text {number}"
        print(f"{label:<12} {printable(generation.text.strip())}")
        print(f"Prompt read  {_speed(generation.prompt_tokens, generation.prefill_tokens_per_second)}")
        print(f"Written      {_speed(generation.new_tokens, generation.decode_tokens_per_second)}", flush=True)


def _speed(tokens: int, tokens_per_second: float | None) -> str:
    return f"{tokens} tokens" + (f", {tokens_per_second:.1f} per second" if tokens_per_second else "")


def _rate(rows: list[dict[str, Any]], tokens: str, seconds: str, untimed: int) -> str:
    """Tokens of all rows, and how many per second; `untimed` of each row are not in its seconds."""
    count, took = sum(row[tokens] for row in rows), sum(row[seconds] for row in rows)
    return _speed(count, (count - untimed * len(rows)) / took if took else None)


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        used = {index: torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
        places = [f"{used_bytes / 1e9:.2f} GB on cuda:{index}" for index, used_bytes in used.items() if used_bytes]
        return f"{', '.join(places)}, allocated by torch while writing"
    unit = 1 if sys.platform == "darwin" else 1024
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak_bytes / 1e9:.2f} GB resident, the whole process since its start"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())
