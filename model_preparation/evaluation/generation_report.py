"""Let models continue the same prompts. Print their texts and speeds, and keep them as JSON lines if wanted."""

import contextlib
import gc
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from model_preparation import interrupts
from model_preparation.errors import SurgeryError, one_line
from model_preparation.evaluation.efficiency import resident_peak_bytes
from model_preparation.evaluation.generation import Generation, generate_text, generate_texts
from model_preparation.evaluation.models import Loaded, OtherModel
from model_preparation.evaluation.prompt_files import Prompt, shown
from model_preparation.evaluation.settings import GenerationSettings
from model_preparation.io.complete_file import write_file
from model_preparation.io.progress import bar
from model_preparation.terminal import escaped

_CHECKPOINT = "checkpoint"  # the tested model's name next to the names of other models
_FAILURES = (SurgeryError, torch.OutOfMemoryError)
_LABEL = 12  # width of the first column where lines are printed
_KEPT = (
    *("text", "new_ids", "prompt_tokens", "new_tokens"),
    *("prefill_seconds", "prefill_tokens_per_second", "decode_seconds", "decode_tokens_per_second"),
)


class GenerationReport:
    """Lets a checkpoint write texts, and then lets other models write texts.

    Args:
        prompts: the same for all models.
        settings: how the models write.
        output: the results file, with one JSON object per text; None for no file.
    """

    def __init__(self, prompts: Sequence[Prompt], settings: GenerationSettings, output: Path | None):
        self._prompts = prompts
        self._settings = settings
        self._output = output
        self._rows: list[dict[str, Any]] = []
        self._generations: list[list[Generation]] = []  # the checkpoint's, per prompt

    def write(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> None:
        """Let the checkpoint write texts. Print each with its speed, and at the end the peak memory.

        Raises:
            SurgeryError: as in `generate_texts`. The results file then has the earlier texts, and the error.
        """
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)
        self._warm_up(model, tokenizer)
        row = self._row(_CHECKPOINT, source, model)
        with self._saved():
            for prompt in self._prompts:
                self._generations.append(self._generate(model, tokenizer, prompt, row))
                _print_texts(prompt, self._generations[-1])
        print(f"\nPeak memory  {_peak_memory(model.device)}", flush=True)

    def compare(
        self, tokenizer: PreTrainedTokenizerBase, others: Sequence[OtherModel], load: Callable[[OtherModel], Loaded]
    ) -> None:
        """Let other models write texts, one model in memory at a time, and print all texts side by side.

        If another model fails, its error takes the place of its text. The caller must not keep a reference to the
        checkpoint's model, so that its memory is free.

        Args:
            tokenizer: the checkpoint's.
            others: the models.
            load: loads one of them.
        """
        columns = [Column(_CHECKPOINT, [[each.text for each in texts] for texts in self._generations])]
        with self._saved():
            for other in others:
                gc.collect()  # reference cycles keep the previous model in memory
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                columns.append(self._write_other(tokenizer, other, load))
                interrupts.check()
        print_side_by_side([shown(prompt) for prompt in self._prompts], columns)

    def check_texts(self) -> None:
        """Raise SurgeryError if the checkpoint wrote nothing after some prompt."""
        for generation in itertools.chain(*self._generations):
            if not generation.text.strip():
                raise SurgeryError(
                    f"The model wrote nothing after {shown(generation.prompt)!r}. Give another --prompt. If it still "
                    "writes nothing, the layers of the checkpoint do not fit its base."
                )

    def _write_other(
        self, tokenizer: PreTrainedTokenizerBase, other: OtherModel, load: Callable[[OtherModel], Loaded]
    ) -> "Column":
        try:
            model, its_tokenizer = load(other)
            self._warm_up(model, its_tokenizer)
        except _FAILURES as error:
            print(f"\nCompared     {other.name}: {other.folder}, not loaded", flush=True)
            self._rows.append({"model": other.name, "source": str(other.folder), "error": one_line(error)})
            return Column(other.name, [[f"failed: {one_line(error)}"]] * len(self._prompts))
        row = self._row(other.name, str(other.folder), model)
        size = f"{model.num_parameters():,} parameters, {row['dtype']}"
        print(f"\nCompared     {other.name}: {other.folder}, {size}", flush=True)
        same_tokenizer = its_tokenizer.get_vocab() == tokenizer.get_vocab()
        column, start = Column(other.name), len(self._rows)
        with bar(other.name, len(self._prompts)) as advance:
            for prompt, own in zip(self._prompts, self._generations, strict=True):
                remarks = []
                try:
                    generations = self._generate(model, its_tokenizer, prompt, row)
                    texts = [each.text if each.text.strip() else "wrote nothing" for each in generations]
                    if self._settings.sampling is None:  # texts drawn at random differ by chance
                        remarks = [difference(own[0], generations[0], same_tokenizer)]
                        self._rows[-1]["difference"] = remarks[0]
                except _FAILURES as error:
                    texts = [f"failed: {one_line(error)}"]
                column.texts.append(texts)
                column.remarks.append(remarks)
                advance(1)
        done = [row for row in self._rows[start:] if "text" in row]
        print(f"Prompts read {_rate(done, 'prompt_tokens', 'prefill_seconds', 0)}")
        print(f"Written      {_rate(done, 'new_tokens', 'decode_seconds', 1)}", flush=True)
        return column

    def _warm_up(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load kernels and read weights, so that the first text is as fast as the others."""
        with contextlib.suppress(SurgeryError):  # then the first prompt fails too, and the report says why
            generate_text(model, tokenizer, self._prompts[0], max_new_tokens=2, chat=self._settings.chat)

    def _generate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, row: dict[str, Any]
    ) -> list[Generation]:
        """Generate texts, and add a row to the results for each. If this fails, add one row with the error."""
        row = row | ({"prompt": prompt} if isinstance(prompt, str) else {"messages": prompt})
        try:
            generations = generate_texts(model, tokenizer, prompt, self._settings)
        except _FAILURES as error:
            self._rows.append({**row, "error": one_line(error)})
            raise
        for number, generation in enumerate(generations):
            self._rows.append({**row, "number": number, **{name: getattr(generation, name) for name in _KEPT}})
        return generations

    def _row(self, name: str, source: str, model: PreTrainedModel) -> dict[str, Any]:
        """The fields that all rows of a model share."""
        return {
            "model": name,
            "source": source,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "chat": self._settings.chat,
            "max_new_tokens": self._settings.max_new_tokens,
            "sampling": self._settings.sampling,
        }

    @contextlib.contextmanager
    def _saved(self) -> Iterator[None]:
        """Write the results file after the block, also if the block fails."""
        try:
            yield
        finally:
            if self._output is not None:
                write_file(self._output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows))


def _print_texts(prompt: Prompt, generations: list[Generation]) -> None:
    print(f"\nPrompt       {printable(shown(prompt))}")
    for number, generation in enumerate(generations, start=1):
        label = "Text" if len(generations) == 1 else f"Text {number}"
        print(f"{label:<12} {printable(generation.text.strip())}")
        print(f"Prompt read  {_speed(generation.prompt_tokens, generation.prefill_tokens_per_second)}")
        print(f"Written      {_speed(generation.new_tokens, generation.decode_tokens_per_second)}", flush=True)


def _speed(tokens: int, tokens_per_second: float | None) -> str:
    return f"{tokens} tokens" + (f", {tokens_per_second:.1f} per second" if tokens_per_second else "")


def _rate(rows: list[dict[str, Any]], tokens: str, seconds: str, untimed: int) -> str:
    """The tokens of all rows and their speed, as text. In each row, the time of `untimed` tokens is not measured."""
    count, took = sum(row[tokens] for row in rows), sum(row[seconds] for row in rows)
    return _speed(count, (count - untimed * len(rows)) / took if took else None)


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        used = {index: torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count())}
        places = [f"{used_bytes / 1e9:.2f} GB on cuda:{index}" for index, used_bytes in used.items() if used_bytes]
        return f"{', '.join(places)}, allocated by torch while writing"
    return f"{resident_peak_bytes() / 1e9:.2f} GB resident, the whole process since its start"


# --- Side by side: columns in a terminal, lines elsewhere -------------------------------------------------------------


@dataclass
class Column:
    """One model: for each prompt, its texts, and remarks on how these differ from the checkpoint's texts."""

    name: str
    texts: list[list[str]] = field(default_factory=list)
    remarks: list[list[str]] = field(default_factory=list)

    def cells(self, prompt: int, count: int) -> list[tuple[str, str]]:
        """`count` pairs (text, remark) for a prompt. A text or remark that is missing is ""."""
        remarks = self.remarks[prompt] if self.remarks else []
        columns = itertools.zip_longest(self.texts[prompt], remarks, range(count), fillvalue="")
        return [(str(text), str(remark)) for text, remark, _ in columns]


def difference(own: Generation, other: Generation, same_tokenizer: bool) -> str:
    """Where two greedy texts first differ: the token, counted from 1, or the character if the tokenizers differ."""
    if same_tokenizer:
        place = _first_difference(own.new_ids, other.new_ids)
        return f"the same {own.new_tokens} tokens" if place is None else f"first differing token: {place}"
    place = _first_difference(own.text, other.text)
    return "other tokenizer; " + ("the same text" if place is None else f"first differing character: {place}")


def _first_difference(one: Sequence, other: Sequence) -> int | None:
    pairs = enumerate(itertools.zip_longest(one, other), start=1)
    return next((place for place, (a, b) in pairs if a != b), None)


def print_side_by_side(prompts: Sequence[str], columns: Sequence[Column], console: Console | None = None) -> None:
    """Print every prompt with the texts that the models wrote after it."""
    console = console or Console()
    names = [escaped(column.name) for column in columns]
    for index, prompt in enumerate(prompts):
        count = max(len(column.texts[index]) for column in columns)
        rows = zip(*(column.cells(index, count) for column in columns), strict=True)
        if console.is_terminal:
            table = Table(title=Text(printable(prompt)), title_justify="left", show_lines=True)
            for name in names:
                table.add_column(Text(name), ratio=1, overflow="fold")
            for row in rows:
                # As Text: rich must not take brackets in a model's text for markup.
                table.add_row(*(Text(printable(text.strip())).append(f"\n{remark}", "dim") for text, remark in row))
            console.print()
            console.print(table)
            continue
        lines = [("Prompt", prompt)]
        for row in rows:
            for name, (text, remark) in zip(names, row, strict=True):
                lines += [(name, text.strip())] * bool(text or remark) + [("", f"({remark})")] * bool(remark)
        indented = "\n" + " " * (_LABEL + 1)
        texts = [f"{label:<{_LABEL}} " + printable(text).replace("\n", indented) for label, text in lines]
        print("\n" + "\n".join(texts), file=console.file)


def printable(text: str) -> str:
    """The text with escaped control characters, because a broken model's text must not control the terminal."""
    return escaped(text, "\n\t")
