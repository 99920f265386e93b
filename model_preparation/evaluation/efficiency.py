"""Measure what a model costs: time to the first token, time per later token, bytes of its cache, peak memory.

Models are measured one after the other, each in its own process, because peak memory is measured per process. Such a
process runs this file too: `main` reads a request as JSON, and prints the measured rows as JSON.
"""

import contextlib
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from model_preparation.checkpoint.checkpoint_folder import write_json
from model_preparation.checkpoint.checkpoint_info import read_info
from model_preparation.checkpoint.load import load_checkpoint
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.command_line import run
from model_preparation.creation_time import creation_time
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.models import OtherModel, digest_of_weights, find_model, find_others, load_folder
from model_preparation.evaluation.settings import EfficiencySettings
from model_preparation.io.complete_folder import new_folder
from model_preparation.io.progress import bar
from model_preparation.io.tensors.dtypes import torch_dtype
from model_preparation.llamba.cache_bytes import cache_bytes
from model_preparation.llamba.cache_llamba import CACHE_NAME
from model_preparation.versions import versions

FOLDER, NUMBERS, PLOT = "efficiency", "efficiency.json", "efficiency.png"
# The measured fields, and how they are shown: {field: (words, unit, the unit's size)}.
MEASURED = {
    "first_token_seconds": ("time to first token", "ms", 1e-3),
    "token_seconds": ("time per token", "ms", 1e-3),
    "cache_bytes": ("cache", "MB", 1e6),
    "peak_memory_bytes": ("peak memory", "MB", 1e6),
}
TOKENS = 16  # generated after the first new token of each context
ROUNDS = 3
_CONTEXTS = (128, 512, 2048)  # by default, those of them that fit into the models' positions
_WARM_UP_TOKENS = 32
_KNOWN = ("llama", "llamba")  # the model types for which the size of the cache can be computed


def measure_efficiency(
    directory: str | Path, settings: EfficiencySettings | None = None, **changes: Any
) -> dict[str, Any]:
    """Measure a checkpoint, its base and its donor. Write efficiency.json and a plot into the checkpoint's results.

    The folder is `efficiency`. An earlier measurement in it is replaced.

    Args:
        directory: the checkpoint's folder; or the name, folder or hub id of another model.
        settings: how to measure; by default `EfficiencySettings()`.
        changes: fields of `EfficiencySettings`, which replace those in `settings`.

    Returns:
        The content of efficiency.json, and `results_dir`. Each of `models` has `name`, `source`, `weights` (a digest),
        `dtype`, `parameters` and `contexts`: rows with `context` (tokens) and the fields of `MEASURED`. Times are
        medians over `rounds`. Other fields are the conditions (`measured_on`, `threads`, `versions`, `date`, ...).

    Raises:
        SurgeryError: if a model is missing, if a context does not fit into a model's positions, if a cache does not
            have the size that the config gives, or if a process fails.
        OSError: if the results cannot be written.
    """
    settings = replace(settings or EfficiencySettings(), **changes)
    scored = find_model(directory, settings.tokenizer, sources=settings.sources)
    others = settings.compare_with or (("base", "donor") if scored.is_checkpoint else ())
    name = "checkpoint" if scored.is_checkpoint else scored.name
    models = [
        OtherModel(name, scored.folder, scored.is_checkpoint),
        *find_others(others, scored.folder, sources=settings.sources),
    ]
    contexts = _contexts(settings.contexts, list(map(_positions, models)))
    target = scored.results_root(settings.results_dir) / FOLDER
    with new_folder(target, overwrite=True, marker_file=NUMBERS) as folder:
        device, dtype = torch.device(settings.device), torch_dtype(settings.dtype)
        request = {"device": str(device), "threads": torch.get_num_threads(), "contexts": contexts}
        request["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
        found = []
        with bar("Measuring", len(models)) as advance:
            for model in models:
                measured = _in_a_process(model, request)
                request["dtype"] = measured["dtype"]  # the others run in the first one's dtype
                found.append(
                    {
                        "name": model.name,
                        "source": model.folder.name,
                        "weights": digest_of_weights(model.folder, model.is_checkpoint),
                        **measured,
                    }
                )
                advance(1)
        result = {
            "models": found,
            "device": device.type,
            "measured_on": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
            "threads": torch.get_num_threads(),
            "rounds": ROUNDS,
            "tokens": TOKENS,
            "versions": versions(),
            "date": creation_time(),
        }
        from model_preparation.evaluation.compare.plots import plot_efficiency, save_png  # slow to import

        save_png(plot_efficiency, result, folder / PLOT)
        write_json(folder / NUMBERS, result)
    return {**result, "results_dir": str(target)}


def _positions(model: OtherModel) -> int | None:
    """The most tokens that a sequence may have; None for a model without a limit."""
    if model.is_checkpoint:
        return read_info(model.folder)["config"].get("max_position_embeddings")
    return getattr(read_config(model.folder).get_text_config(), "max_position_embeddings", None)


def _contexts(wanted: Sequence[int] | None, limits: Sequence[int | None]) -> list[int]:
    most = min((limit for limit in limits if limit is not None), default=None)
    if most is None:
        return sorted(set(wanted or _CONTEXTS))
    fits = [context for context in sorted(set(wanted or _CONTEXTS)) if context + TOKENS <= most]
    if wanted is not None and len(fits) < len(set(wanted)):
        raise SurgeryError(
            f"A context of {max(wanted)} tokens and {TOKENS} new ones are longer than the {most} positions of the "
            f"models. Give --contexts up to {most - TOKENS}."
        )
    return fits or [most - TOKENS]


def resident_peak_bytes() -> int:
    """The peak memory of this process, in bytes."""
    with contextlib.suppress(OSError):
        # getrusage would also count the peak of the process from which this one was forked.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _processor() -> str:
    """The processor's name (without Linux: its architecture), and how many threads torch uses, as text."""
    name, threads = os.uname().machine, torch.get_num_threads()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def _in_a_process(model: OtherModel, request: dict[str, Any]) -> dict[str, Any]:
    request = {**request, "name": model.name, "folder": str(model.folder.resolve()), "checkpoint": model.is_checkpoint}
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.run(
        [sys.executable, "-m", __spec__.name],
        env={**os.environ, "PYTHONPATH": paths},  # so the process imports this same package
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"ended by signal {-process.returncode}"]
        if process.returncode != 1 or not lines[-1].startswith("error: "):
            print(process.stderr, file=sys.stderr, end="")
        reason = lines[-1].removeprefix("error: ").rstrip(".")
        raise SurgeryError(
            f"{model.name} ({model.folder}) could not be measured: {reason}. "
            "If the memory was too small, give shorter --contexts."
        )
    return json.loads(process.stdout.splitlines()[-1])


# --- The process of one model -----------------------------------------------------------------------------------------


def main() -> None:
    request = json.loads(sys.stdin.read())
    torch.set_num_threads(request["threads"])
    device, dtype, folder = torch.device(request["device"]), torch_dtype(request["dtype"]), Path(request["folder"])
    if request["checkpoint"]:
        model = load_checkpoint(folder, device=device, dtype=dtype)[0]
    else:
        model = load_folder(folder, dtype)
        model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the method's own signature
    with torch.inference_mode():
        _read_and_write(model, _WARM_UP_TOKENS)
        rows = [{"context": context, **_measure(model, context, request["name"])} for context in request["contexts"]]
    ran_in = str(model.dtype).removeprefix("torch.")
    print(json.dumps({"dtype": ran_in, "parameters": model.num_parameters(), "contexts": rows}))


def _measure(model: PreTrainedModel, context: int, name: str) -> dict[str, Any]:
    """The fields of `MEASURED` after a prompt of `context` tokens."""
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(model.device)
    else:
        with contextlib.suppress(OSError):  # a peak that cannot be reset includes the loading of the model
            Path("/proc/self/clear_refs").write_text("5")
    rounds = [_read_and_write(model, context) for _ in range(ROUNDS)]
    size_bytes = rounds[0][2]
    expected = _computed_bytes(model.config, context, model.dtype)
    if expected not in (None, size_bytes):
        raise SurgeryError(
            f"The cache of {name} holds {size_bytes:,} bytes after {context} tokens, but its config says {expected:,}. "
            "The memory figures would be wrong. Report this problem, and add the model's config.json."
        )
    return {
        "first_token_seconds": statistics.median(first for first, _, _ in rounds),
        "token_seconds": statistics.median(seconds for _, each, _ in rounds for seconds in each),
        "cache_bytes": size_bytes,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(model.device) if on_gpu else resident_peak_bytes(),
    }


def _read_and_write(model: PreTrainedModel, context: int) -> tuple[float, list[float], int]:
    """Seconds to the first token, seconds of each later token, bytes of the cache after the prompt."""
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(model.config.vocab_size, (1, context), generator=generator).to(model.device)
    times, cache, size_bytes = [time.perf_counter()], None, 0
    for _ in range(TOKENS + 1):
        out = model(input_ids=ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1)
        ids, cache = out.logits[:, -1:].argmax(-1), out[CACHE_NAME]
        ids[0, 0].item()  # waits for the device
        if len(times) == 1:
            storages = {each.untyped_storage() for layer in cache.layers for each in _tensors(vars(layer))}
            size_bytes = sum({each.data_ptr(): each.nbytes() for each in storages}.values())
        times.append(time.perf_counter())
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return seconds[0], seconds[1:], size_bytes


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _computed_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int | None:
    """The size of the cache in bytes, computed from the config; None for a model type that is not in `_KNOWN`."""
    if config.model_type not in _KNOWN:
        return None
    layers = len(config.llama_layers) if config.model_type == "llamba" else config.num_hidden_layers
    return cache_bytes(config, layers, tokens, dtype)


if __name__ == "__main__":
    run(main)
