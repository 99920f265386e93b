"""All checks and measurements that need a GPU, in one run: first whether results are right, then how fast they come.

Each part is a separate process with a time limit. Each measured value is at once in results.json and results.md in
--output_dir, so the run may be stopped at any time. Weights are random, made on the device from a seed: no model is
needed. If a part needs a package that is not installed, its row names the package. --device cpu --shape tiny shows on a
CPU that the script works.

The questions are MMLU's, from --mmlu_data. Without this flag, made-up questions of about the same length are used. The
regular expression of Llama 3's tokenizer cuts questions into tokens, so no model's tokenizer is needed either.

    python benchmarks/gpu.py --output_dir results --mmlu_data MMLU
    python benchmarks/gpu.py --output_dir results --shape tiny --device cpu
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, StaticCache
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from model_preparation.llamba import LlambaConfig, LlambaForCausalLM, ssd
from model_preparation.llamba.cache_llamba import CACHE_NAME, LlambaCache
from model_preparation.llamba.donor_kinds import KINDS
from model_preparation.llamba.mixer import LlambaMixer

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 128, "layers": 4, "mlp": 256, "heads": 4, "kv_heads": 2, "vocabulary": 512},
    "1b": {"width": 2048, "layers": 16, "mlp": 8192, "heads": 32, "kv_heads": 8, "vocabulary": 128256},
    "8b": {"width": 4096, "layers": 32, "mlp": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 128256},
}
GRAFTS = {"tiny": [1, 3], "1b": [3, 6, 8, 10], "8b": [11, 13, 17, 21]}
CONTEXTS = {"tiny": [64, 256], "1b": [1024, 8192, 32768], "8b": [1024, 8192, 32768]}
PACKAGES = ("torch", "transformers", "accelerate", "peft", "lm_eval", "flash-linear-attention", "triton")
POPULATION, GENERATIONS, QUESTIONS = 40, 20, 1000  # of the genetic search whose cost is computed
# Llama 3's tokenizer first splits a text into these pieces. Nearly all common words are one token there.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"

WARM_UP = 3  # steps before a CUDA graph is captured

Row = dict[str, Any]


def row(what: str, value: float, unit: str, **more: Any) -> Row:
    """One measured value. `more` may have the limits `at_most` and `at_least`, and a `note`."""
    return {"what": what, "value": value, "unit": unit, **more}


# The models.


def configs(shape: str, layers: Sequence[int] = ()) -> tuple[LlamaConfig, LlambaConfig]:
    """The config of the donor, and the config of the Llamba with these layers grafted."""
    s = SHAPES[shape]
    donor = LlamaConfig(
        vocab_size=s["vocabulary"],
        hidden_size=s["width"],
        num_hidden_layers=s["layers"],
        intermediate_size=s["mlp"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        head_dim=s["width"] // s["heads"],
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    llamba = LlambaConfig(
        vocab_size=s["vocabulary"],
        d_model=s["width"],
        n_layer=s["layers"],
        mlp_cfg={"intermediate_size": s["mlp"]},
        ssm_cfg={"n_v_heads": s["heads"], "n_qk_heads": s["heads"], "d_state": 64},
        llama_layers=list(layers),
        llama_cfg=KINDS["llama"].settings(donor) if layers else None,
    )
    return donor, llamba


def make(name: str, shape: str, device: str, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    """A model of a shape with random weights. `name`: "base", "graft", "all" (all layers grafted) or "donor"."""
    grafts = {"graft": GRAFTS[shape], "all": range(SHAPES[shape]["layers"])}
    donor, llamba = configs(shape, grafts.get(name, ()))
    with torch.device("meta"):
        model = (LlamaForCausalLM(donor) if name == "donor" else LlambaForCausalLM(llamba)).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for module in list(model.modules()):
        for child, rotary in module.named_children():
            if isinstance(rotary, LlamaRotaryEmbedding):  # its buffers are not random: compute them
                setattr(module, child, LlamaRotaryEmbedding(rotary.config).to(device))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(0, 0.02, generator=generator)
            if "norm" in parameter_name:
                parameter.add_(1)
    model.tie_weights()
    return model.eval()


def cache_of(model: torch.nn.Module) -> Any:
    return DynamicCache(config=model.config) if isinstance(model, LlamaForCausalLM) else LlambaCache(model.config)


def cache_bytes(cache: Any) -> int:
    """Bytes of the tensors that a cache holds."""
    kept = 0
    for layer in cache.layers:
        if hasattr(layer, "states"):
            kept += sum(state.nbytes for state in layer.states() if state is not None)
        elif layer.keys is not None:
            kept += layer.keys.nbytes + layer.values.nbytes
    return kept


def tokens(batch: int, length: int, model: torch.nn.Module, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (batch, length), generator=generator).to(model.device)


def read(model: torch.nn.Module, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Run a prompt into the cache. Return the next token, (batch, 1)."""
    return model(ids, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1).logits.argmax(-1)


def next_token(model: Any, last: torch.Tensor, cache: Any) -> torch.Tensor:
    """One greedy step, (batch, 1) -> (batch, 1)."""
    return model(last, **{CACHE_NAME: cache}, use_cache=True).logits.argmax(-1)


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(device: str, run: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of `run`. The first call is not counted."""
    taken = []
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a large copy on the device moves: bytes read plus bytes written."""
    source = torch.empty(2**31 if device.startswith("cuda") else 2**27, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(device, lambda: target.copy_(source))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of (found - wanted), divided by the norm of `wanted`."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


# The parts, the most important first.


def part_tests(args: argparse.Namespace) -> Iterator[Row]:
    """The project's own tests that need a GPU. On a CPU: the tests that run on either device."""
    if importlib.util.find_spec("pytest") is None:
        yield row("pytest is not installed", 0, "")
        return
    chosen = ["-m", "gpu"] if args.device.startswith("cuda") else ["-k", "on_cpu"]
    # pytest gets only these files, because others import packages that may not be installed.
    files = sorted(path for path in (REPOSITORY / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    files += sorted(path for path in (REPOSITORY / "tests").rglob("test_*.py") if "on_device" in path.read_text())
    command = [sys.executable, "-m", "pytest", "-q", *chosen, "-p", "no:cacheprovider", *map(str, dict.fromkeys(files))]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    said = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["nothing was printed"]
    yield row(f"pytest {' '.join(chosen)}: exit code", done.returncode, "", at_most=0, note=said[-1].strip("= "))
    for line in said:
        if line.startswith(("FAILED", "ERROR")):
            yield row(line[:200], 1, "", at_most=0)


@torch.no_grad()
def part_correct(args: argparse.Namespace) -> Iterator[Row]:
    """Logits against the CPU in float32; other ways to run a prompt, against the plain way; and the scan."""
    lost = {}
    for name in ("donor", "base", "graft"):
        on_cpu = make(name, "tiny", "cpu", torch.float32)
        on_device = make(name, "tiny", args.device, torch.float32)
        on_device.load_state_dict(on_cpu.state_dict())
        ids = tokens(2, 300, on_cpu)
        wanted = on_cpu(ids).logits
        yield row(
            f"{name}: logits against the CPU, float32",
            error(on_device(ids.to(args.device)).logits, wanted),
            "relative",
            at_most=1e-4,
        )
        for dtype in (torch.bfloat16, torch.float16):
            found = error(on_device.to(dtype)(ids.to(args.device)).logits, wanted)
            lost[name, dtype] = found
            yield row(
                f"{name}: logits in {dtype} against float32".replace("torch.", ""),
                found,
                "relative",
                at_most=2 * lost["donor", dtype],
            )
            on_device.float().load_state_dict(on_cpu.state_dict())
        yield from _ways_to_run(name, on_device)
    yield from _kernels(args.device)


def _ways_to_run(name: str, model: torch.nn.Module) -> Iterator[Row]:
    ids = tokens(1, 96, model)
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = model.generate(ids, use_cache=False, **options)
    yield row(
        f"{name}: cached tokens that differ", int((model.generate(ids, **options) != plain).sum()), "tokens", at_most=0
    )
    pieces = model.generate(ids, prefill_chunk_size=17, **options)
    yield row(f"{name}: tokens that differ, prompt in chunks", int((pieces != plain).sum()), "tokens", at_most=0)
    if name == "donor":
        return
    wanted = model(ids).logits[0]
    for side in ("left", "right"):
        place = slice(30, None) if side == "left" else slice(0, 96)
        padded, mask = tokens(1, 126, model, seed=5), torch.zeros(1, 126, dtype=torch.long, device=model.device)
        padded[:, place], mask[:, place] = ids, 1
        found = model(padded, attention_mask=mask).logits[0, place]
        yield row(f"{name}: padded on the {side}", error(found, wanted), "relative", at_most=1e-4)
    both, lengths = tokens(1, 80, model, seed=6), (30, 50)
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(model.device)
    alone = torch.cat([model(text).logits for text in both.split(lengths, dim=1)], 1)
    yield row(
        f"{name}: packed documents", error(model(both, position_ids=positions).logits, alone), "relative", at_most=1e-4
    )


def _kernels(device: str) -> Iterator[Row]:
    """Our scan in float32 and the optional kernel in bfloat16, against our scan in float64: output and gradients."""
    generator = torch.Generator().manual_seed(0)
    x, B, C, decay = (torch.randn(2, 300, 4, width, generator=generator).bfloat16() for width in (64, 64, 64, 1))
    decay = -torch.nn.functional.softplus(decay.squeeze(-1).float())
    names = ("output", "state", "gradient of x", "of B", "of C", "of the decay")

    def run(device: str, dtype: torch.dtype, of_decay: torch.dtype) -> list[torch.Tensor]:
        x_, B_, C_ = (t.to(device, dtype).requires_grad_() for t in (x, B, C))
        decay_ = decay.to(device, of_decay).requires_grad_()
        with torch.enable_grad():
            y, state = ssd.scan(x_, decay_, B_, C_, 64)
            return [y, state, *torch.autograd.grad(y.square().sum() + state.square().sum(), [x_, B_, C_, decay_])]

    wanted = run("cpu", torch.float64, torch.float64)
    kernels = [("PyTorch in float32", torch.float32, 1e-4)]
    if device.startswith("cuda") and ssd._has_flash_linear_attention():
        kernels.append(("flash-linear-attention in bfloat16", torch.bfloat16, 2e-2))
    else:
        yield row("flash-linear-attention is not installed, or there is no CUDA device", 0, "")
    for kernel, dtype, limit in kernels:
        for name, ours, exact in zip(names, run(device, dtype, torch.float32), wanted, strict=True):
            yield row(f"scan by {kernel}, {name}", error(ours.detach(), exact.detach()), "relative", at_most=limit)


@torch.inference_mode()
def part_decode(args: argparse.Namespace) -> Iterator[Row]:
    """Speed of prompts and single tokens in base, graft and donor, in bfloat16; the share of the bandwidth limit."""
    bandwidth = copy_bandwidth(args.device)
    on_cuda = args.device.startswith("cuda")
    yield row("copy on the device", bandwidth / 1e9, "GB/s")
    for name in ("base", "donor", "graft"):
        model = make(name, args.shape, args.device, torch.bfloat16)
        for context in CONTEXTS[args.shape]:
            ids = tokens(1, context, model)
            first = read(model, ids, cache_of(model))  # the first run of a shape also compiles kernels
            taken = seconds(args.device, lambda ids=ids, model=model: read(model, ids, cache_of(model)), repeats=2)
            yield row(f"{name}: prompt of {context}", context / taken, "tokens/s")
            if name == "base" and on_cuda and ssd._has_flash_linear_attention():
                with patch.object(ssd, "_has_flash_linear_attention", lambda: False):
                    taken = seconds(args.device, lambda ids=ids, model=model: read(model, ids, cache_of(model)), 1)
                yield row(f"{name}: prompt of {context}, scan by PyTorch", context / taken, "tokens/s")
            for batch in (1, 32):
                needed = batch * context * _bytes_per_token(model)
                cache = None
                if on_cuda:
                    torch.cuda.empty_cache()  # or else mem_get_info counts torch's free blocks as used
                if on_cuda and needed > 0.4 * torch.cuda.mem_get_info()[0]:
                    yield row(f"{name}, batch {batch}, context {context}: left out", needed / 1e9, "GB of K/V")
                    continue
                cache = cache_of(model)
                read(model, ids, cache)
                cache.batch_repeat_interleave(batch)
                last = first.expand(batch, 1)
                took = seconds(args.device, lambda m=model, t=last, c=cache: next_token(m, t, c), repeats=20)
                where = f"{name}, batch {batch}, context {context}: token"
                yield from _token_rows(where, took, model, cache, bandwidth)
        if on_cuda:
            yield row(f"{name}: peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
            torch.cuda.reset_peak_memory_stats()
        del model, cache


def _token_rows(where: str, took: float, model: Any, cache: Any, bandwidth: float, **goal: float) -> Iterator[Row]:
    head = model.get_input_embeddings().weight  # a step reads only one row of the embedding
    needed = sum(parameter.nbytes for parameter in model.parameters()) - head.nbytes + cache_bytes(cache)
    yield row(where, 1000 * took, "ms")
    yield row(f"{where}, share of the limit by bandwidth", needed / bandwidth / took, "", **goal)


def _bytes_per_token(model: torch.nn.Module) -> int:
    config = model.config
    layers = config.num_hidden_layers if isinstance(model, LlamaForCausalLM) else len(config.llama_layers)
    return 2 * layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


@torch.inference_mode()
def part_compile(args: argparse.Namespace) -> Iterator[Row]:
    """A step through torch.compile, then as one CUDA graph: first whether the tokens are the same, then its time.

    In a graph, no kernel waits for Python. A graft's step cannot be in a graph: its K/V are new tensors at each token.
    On a CPU there is no graph, but the same code runs with the cache that a graph needs.
    """
    bandwidth = copy_bandwidth(args.device)
    graph = "in a CUDA graph" if args.device.startswith("cuda") else "fixed cache"
    for in_graph, names in ((False, ("base", "donor", "graft")), (True, ("base", "donor"))):
        for name in names:
            model = make(name, "tiny", args.device, torch.float32)
            plain = _greedy(model, False)
            with compiled(args.compile):
                differing = int((_greedy(model, in_graph) != plain).sum())
            how = f"compiled, {graph}" if in_graph else "compiled"
            yield row(f"{name}: tokens that differ, {how}", differing, "", at_most=0)
        for name in names:
            model = make(name, args.shape, args.device, torch.bfloat16)
            for context in CONTEXTS[args.shape]:
                ids = tokens(1, context, model)
                for compiling in (False, True) if in_graph else (True,):
                    cache = fixed_cache(model, context + 64) if in_graph else cache_of(model)
                    last = read(model, ids, cache)
                    where = f"{name}, batch 1, context {context}: token" + ", compiled" * compiling
                    with compiled(args.compile) if compiling else nullcontext():
                        run, goal = partial(next_token, model, last, cache), {}
                        if in_graph:
                            run, where = captured(model, last, cache)[0], f"{where}, {graph}"
                            goal = {"at_least": 0.8} if compiling and args.shape == "8b" else {}
                        yield from _token_rows(where, seconds(args.device, run, 20), model, cache, bandwidth, **goal)
            del model


def _greedy(model: Any, fixed: bool, count: int = 16) -> torch.Tensor:
    """`count` greedy tokens, (2, count), that follow two prompts and the warm-up; in a graph if `fixed`."""
    ids = tokens(2, 64, model)
    cache = fixed_cache(model, 128) if fixed else cache_of(model)
    last = read(model, ids, cache)
    if fixed:
        run, last = captured(model, last, cache)
    else:
        last = last.clone()
        run = lambda: last.copy_(next_token(model, last, cache))  # noqa: E731
        for _ in range(WARM_UP):
            run()
    found = []
    for _ in range(count):
        run()
        found.append(last.clone())
    return torch.cat(found, 1)


def fixed_cache(model: Any, longest: int) -> Any:
    """A cache whose tensors keep their places in memory, as a CUDA graph needs."""
    is_llama = isinstance(model, LlamaForCausalLM)
    return StaticCache(config=model.config, max_cache_len=longest) if is_llama else LlambaCache(model.config)


def captured(model: Any, first: torch.Tensor, cache: Any) -> tuple[Callable[[], object], torch.Tensor]:
    """A greedy step as a CUDA graph (without CUDA a plain function), and the token that it reads and overwrites."""
    last = first.clone()

    def step() -> None:
        last.copy_(next_token(model, last, cache))

    if not last.is_cuda:
        for _ in range(WARM_UP):
            step()
        return step, last
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay, last


@contextmanager
def compiled(backend: str) -> Iterator[None]:
    """Inside the block, mixers without their cache, MLPs and norms are compiled, once for all layers."""
    with ExitStack() as stack:
        for kind, method in ((LlambaMixer, "_mix"), (LlamaMLP, "forward"), (LlamaRMSNorm, "forward")):
            stack.enter_context(
                patch.object(kind, method, torch.compile(getattr(kind, method), backend=backend, dynamic=False))
            )
        yield


@contextmanager
def asked(args: argparse.Namespace) -> Iterator[tuple[Path, list[str], int, str]]:
    """(folder, names of tasks, questions per task, "MMLU's" or "made up") of the questions to ask."""
    from model_preparation.evaluation.mmlu_questions import SUBJECTS

    subjects, limit = (12, 20) if args.shape != "tiny" else (2, 4)
    names = [f"mmlu_{SUBJECTS[len(SUBJECTS) * number // subjects]}" for number in range(subjects)]
    if args.mmlu_data:
        yield args.mmlu_data, names, limit, "MMLU's"
        return
    draw = random.Random(3)

    def some(least: int, most: int) -> str:
        letters = "abcdefghijklmnopqrstuvwxyz"
        return " ".join("".join(draw.choices(letters, k=draw.randint(2, 3))) for _ in range(draw.randint(least, most)))

    with tempfile.TemporaryDirectory() as folder:
        for subject, (split, count) in itertools.product(SUBJECTS, (("dev", 5), ("test", limit))):
            path = Path(folder, subject, f"{split}.jsonl")
            path.parent.mkdir(exist_ok=True)
            rows = [
                {"question": some(20, 110), "choices": [some(2, 18) for _ in "ABCD"], "answer": draw.randrange(4)}
                for _ in range(count)
            ]
            path.write_text("".join(json.dumps(each) + "\n" for each in rows))
        yield Path(folder), names, limit, "made up"


def word_tokenizer(folder: Path, names: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each piece that WORDS cuts the questions into."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    from model_preparation.evaluation.mmlu_questions import read_split

    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    pieces = dict.fromkeys([" A", " B", " C", " D"])
    for name, part in itertools.product(names, ("dev", "test")):
        for each in read_split(folder, name.removeprefix("mmlu_"), part):
            for text in (each["question"], *each["choices"]):
                pieces |= dict.fromkeys(piece for piece, _ in split.pre_tokenize_str(" " + text))
    # The four letters of the choices come first, so each has its own id, even in a small vocabulary.
    ids = {piece: 1 + (number if number < 4 else 4 + number % (vocabulary - 5)) for number, piece in enumerate(pieces)}
    words = Tokenizer(models.WordLevel({"<unk>": 0, **ids}, unk_token="<unk>"))
    words.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>", pad_token="<unk>")


def question_set(lm: Any, folder: Path, names: Sequence[str], limit: int, shots: int) -> Any:
    from model_preparation.evaluation.evaluate import settings_of
    from model_preparation.evaluation.settings import EvaluationSettings
    from model_preparation.evaluation.tasks import load_tasks, quiet
    from model_preparation.search.question_set import QuestionSet

    loaded = load_tasks(names, mmlu_data=folder, num_fewshot=shots)
    wanted = settings_of(loaded, EvaluationSettings(limit=limit, num_fewshot=shots))
    with quiet():
        return QuestionSet(lm, loaded, {**wanted, "device": lm.device.type})


def answer_all(lm: Any, questions: Any) -> tuple[list[float], float]:
    """The log-likelihoods of all choices, asked task by task, and the seconds that this took."""
    wait(lm.device.type)
    started = time.perf_counter()
    answers = []
    for task in range(len({batch.task for batch in questions.batches})):
        answers += lm._loglikelihood_tokens(questions.tokens(task), disable_tqdm=True)
    wait(lm.device.type)
    return [value for value, _ in answers], time.perf_counter() - started


def choices(values: Sequence[float]) -> list[int]:
    return [max(range(4), key=values[start : start + 4].__getitem__) for start in range(0, len(values), 4)]


@torch.inference_mode()
def part_scores(args: argparse.Namespace) -> Iterator[Row]:
    """Questions of MMLU per second: our code against lm-eval's own model."""
    if importlib.util.find_spec("lm_eval") is None:
        yield row("lm_eval is not installed", 0, "")
        return
    from lm_eval.models.huggingface import HFLM

    from model_preparation.evaluation.scoring_lm import ScoringLM

    model = make("graft", args.shape, args.device, torch.bfloat16)
    with asked(args) as (folder, names, limit, kind):
        tokenizer = word_tokenizer(folder, names, model.config.vocab_size)
        for shots in (0, 5):
            values, per_second = {}, {}
            sides = {"ours": ScoringLM(model, tokenizer, 32), "stock": HFLM(model, tokenizer=tokenizer, batch_size=32)}
            questions = question_set(sides["ours"], folder, names, limit, shots)
            count = len(questions.questions)
            for side, lm in sides.items():
                if shots == 0:
                    answer_all(lm, questions)  # the first run of a shape also compiles kernels
                values[side], took = answer_all(lm, questions)
                per_second[side] = count / took
                yield row(f"{shots}-shot, {side}", per_second[side], "questions/s", note=f"{count} questions, {kind}")
            goal = {"at_least": 4} if shots == 5 and args.shape == "8b" else {}
            yield row(f"{shots}-shot, ours / stock", per_second["ours"] / per_second["stock"], "times", **goal)
            differing = sum(map(int.__ne__, choices(values["ours"]), choices(values["stock"])))
            yield row(f"{shots}-shot, choices that differ", differing, f"of {count}")


@torch.inference_mode()
def part_search(args: argparse.Namespace) -> Iterator[Row]:
    """The cost of a candidate that shares layers, and of one that runs alone. The hours of a genetic search."""
    if importlib.util.find_spec("lm_eval") is None:
        yield row("lm_eval is not installed", 0, "")
        return
    from model_preparation.evaluation.scoring_lm import ScoringLM
    from model_preparation.search.layer_sets import SearchSpace, count_passes
    from model_preparation.search.model_pair import ModelPair
    from model_preparation.search.settings import SearchSettings
    from model_preparation.search.shared_scoring import SharedScorer

    whole = make("all", args.shape, args.device, torch.bfloat16)
    base = make("base", args.shape, args.device, torch.bfloat16, seed=1).backbone.layers
    draw, space = random.Random(0), SearchSpace(len(base), 1, 4)
    sets = sorted({space.draw(draw) for _ in range(2 * POPULATION)})
    sets = sorted(draw.sample(sets, min(POPULATION, len(sets))))
    with asked(args) as (folder, names, limit, kind):
        pair = ModelPair(whole, base, word_tokenizer(folder, names, whole.config.vocab_size))
        lm = ScoringLM(whole, pair.tokenizer)
        questions = question_set(lm, folder, names, limit, 0)
        settings = SearchSettings(args.output_dir, memory_bytes=64_000_000_000)
        share = QUESTIONS / len(questions.questions)
        scorer: Any = SharedScorer(SimpleNamespace(pair=pair, lm=lm, questions=questions, settings=settings))
        scorer.base()
        wait(args.device)
        until = time.perf_counter() + 0.6 * PARTS["search"][1]
        before, started = scorer.layer_passes, time.perf_counter()
        found = {}
        for layers, results in scorer.score(sets):
            found[layers] = results
            if time.perf_counter() > until:
                break
        wait(args.device)
        per_pass = (time.perf_counter() - started) / (scorer.layer_passes - before)
        passes = count_passes(sets, len(base)) - len(base)
        note = f"{len(found)} sets, {len(questions.questions)} questions, {kind}"
        yield row("layer passes, shared / alone", passes / len(sets) / len(base), "", note=f"{len(sets)} sets")
        together = per_pass * passes / len(sets) * share
        yield row(f"candidate, {QUESTIONS} questions, shared", together, "s", note=note)
        alone, differing = [], 0
        for layers in list(found)[:: max(1, len(found) // 3)]:
            lm._model = _graft_of(pair, layers, args.shape)
            values, took = answer_all(lm, questions)
            alone.append(took * share)
            answers = [
                dict(
                    answer
                    for number, result in found[layers].items()
                    for answer in result.answers
                    if questions.batches[number].task == task
                )
                for task in range(len(names))
            ]
            ours = [answers[task][request][0] for task in range(len(names)) for request in sorted(answers[task])]
            differing += sum(map(int.__ne__, choices(ours), choices(values)))
        yield row(f"candidate, {QUESTIONS} questions, alone", statistics.median(alone), "s", note=f"{len(alone)} sets")
        yield row("choices that differ", differing, "", at_most=0)
        for name, cost in (("shared", together), ("alone", statistics.median(alone))):
            hours = POPULATION * GENERATIONS * cost / 3600
            goal = {"at_most": 10} if name == "shared" and args.shape == "8b" else {}
            what = f"genetic search, {POPULATION} x {GENERATIONS}, {QUESTIONS} questions, {name}"
            yield row(what, hours, "hours", note="no race, no set twice", **goal)


def _graft_of(pair: Any, layers: Sequence[int], shape: str) -> LlambaForCausalLM:
    """A graft made from modules of both models, without copying weights."""
    with torch.device("meta"):
        model = LlambaForCausalLM(configs(shape, layers)[1])
    model.lm_head, whole = pair.model.lm_head, pair.model.backbone
    model.backbone.embedding, model.backbone.final_layernorm = whole.embedding, whole.final_layernorm
    model.backbone.rotary_emb = whole.rotary_emb
    model.backbone.layers = torch.nn.ModuleList(pair.layer(index, index in layers) for index in range(pair.layers))
    return model.eval()


def part_heal(args: argparse.Namespace) -> Iterator[Row]:
    """Speed and memory of a training step of a graft in bfloat16: the grafted layers alone, and LoRA on every layer."""
    length = 2048 if args.shape != "tiny" else 64
    for method in ("grafted layers", "LoRA"):
        if method == "LoRA" and importlib.util.find_spec("peft") is None:
            yield row("peft is not installed", 0, "")
            continue
        model = make("graft", args.shape, args.device, torch.bfloat16)
        if method == "LoRA":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(any(f".layers.{index}." in name for index in model.config.llama_layers))
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5)
        ids = torch.randint(1, model.config.vocab_size, (1, length), device=args.device)

        def step(model: Any = model, optimizer: Any = optimizer, ids: Any = ids) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        took = seconds(args.device, step, repeats=3)
        yield row(f"training {method}, {length} tokens", length / took, "tokens/s")
        if args.device.startswith("cuda"):
            yield row(f"training {method}: peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
            torch.cuda.reset_peak_memory_stats()
        del model, optimizer, trained


@torch.no_grad()
def part_load(args: argparse.Namespace) -> Iterator[Row]:
    """Loading a checkpoint to the device, against reading its file and copying the bytes to the device."""
    from tokenizers import Tokenizer, models

    from model_preparation import build_checkpoint, extract_layers, load_checkpoint

    shape = "1b" if args.shape == "8b" else args.shape
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in ("base", "donor"):
            make(side, shape, args.device, torch.bfloat16).save_pretrained(folder / side)
        words = Tokenizer(models.WordLevel({"<unk>": 0, "A": 1}, unk_token="<unk>"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(folder / "donor")
        extract_layers(str(folder / "donor"), folder / "layers")
        build_checkpoint(str(folder / "base"), GRAFTS[shape], folder / "layers", folder / "checkpoint")
        weights = folder / "checkpoint" / "model_state_dict.pt"
        size_bytes = weights.stat().st_size

        def plain() -> None:
            torch.frombuffer(bytearray(weights.read_bytes()), dtype=torch.uint8).to(args.device)

        def load() -> None:
            load_checkpoint(folder / "checkpoint", device=args.device)

        for what, run in (("reading and copying", plain), ("load_checkpoint", load)):
            taken = seconds(args.device, run, 3)
            yield row(f"{what}, {size_bytes / 1e9:.1f} GB", size_bytes / taken / 1e9, "GB/s")


@torch.inference_mode()
def part_profile(args: argparse.Namespace) -> Iterator[Row]:
    """The ten kernels that take longest in a decode step and in a prompt of the base."""
    from torch.profiler import ProfilerActivity, profile

    model = make("base", args.shape, args.device, torch.bfloat16)
    cache = cache_of(model)
    ids = tokens(1, CONTEXTS[args.shape][0], model)
    following = read(model, ids, cache)
    on_cuda = args.device.startswith("cuda")
    for name, run in (
        ("token", lambda: model(following, **{CACHE_NAME: cache}, use_cache=True)),
        ("prompt", lambda: model(ids)),
    ):
        run()
        with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiled:
            run()
            wait(args.device)
        key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
        events = sorted(profiled.key_averages(), key=lambda event: -getattr(event, key))
        whole = sum(getattr(event, key) for event in events) or 1
        yield row(f"{name}: kernels", sum(event.count for event in events), "calls")
        for event in events[:10]:
            share = getattr(event, key) / whole
            yield row(f"{name}: {event.key[:60]}", 100 * share, "% of the time", note=f"{event.count} calls")


# {name: (part, the most seconds that it may take on a GPU)}
PARTS: dict[str, tuple[Callable[[argparse.Namespace], Iterator[Row]], int]] = {
    "tests": (part_tests, 110),
    "correct": (part_correct, 60),
    "decode": (part_decode, 90),
    "scores": (part_scores, 90),
    "compile": (part_compile, 110),
    "search": (part_search, 70),
    "heal": (part_heal, 60),
    "load": (part_load, 60),
    "profile": (part_profile, 60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="results.json and results.md go here")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mmlu_data", type=Path, help="MMLU's folder; without it, questions are made up")
    parser.add_argument("--compile", metavar="BACKEND", help="of torch.compile (default: inductor, on a CPU aot_eager)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # run this part, print each row as JSON
    args = parser.parse_args()
    args.compile = args.compile or ("inductor" if args.device.startswith("cuda") else "aot_eager")
    if args.mmlu_data and not args.mmlu_data.is_dir():
        parser.error(f"--mmlu_data {args.mmlu_data} is no folder. Give MMLU's folder, or leave it out")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.part:
        if args.device == "cpu":
            torch.set_num_threads(1)
        for found in PARTS[args.part][0](args):
            print(json.dumps(found), flush=True)
        return
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"torch sees no CUDA device here. Try --shape tiny --device cpu; torch is {torch.__version__}")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # run_part then stops the part
    results = {"machine": machine(args), "parts": {}}
    until = time.monotonic() + 60 * args.minutes

    def save() -> None:
        (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (args.output_dir / "results.md").write_text(table(results))

    for name in args.parts:
        part = results["parts"][name] = {"rows": [], "seconds": 0, "ended": "no time was left"}
        limit = min(PARTS[name][1] * (4 if args.device == "cpu" else 1), until - time.monotonic())
        if limit > 5:
            run_part(name, limit, part, save)
        save()
    print(table(results))
    print(f"Results: {args.output_dir / 'results.md'}")
    failed = [f"{name}: {part['ended']}" for name, part in results["parts"].items() if part["ended"] != "done"]
    failed += [
        f"{name}: {row['what']}" for name, part in results["parts"].items() for row in part["rows"] if not is_right(row)
    ]
    if failed:
        sys.exit("Failed, or beyond a limit:\n" + "\n".join(failed))


def run_part(name: str, limit: float, part: dict[str, Any], save: Callable[[], None]) -> None:
    """Run a part for at most `limit` seconds. Each of its rows is saved at once."""
    print(f"{name} (at most {limit:.0f} s)", flush=True)
    started = time.monotonic()
    command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, process_group=0, **pipes)
    assert process.stdout

    def stop() -> None:
        os.killpg(process.pid, signal.SIGKILL)  # also kills the tests that the part started

    timer = threading.Timer(limit, stop)
    timer.start()
    complaints: list[str] = []
    reader = threading.Thread(target=lambda: complaints.extend(process.stderr), daemon=True)
    reader.start()
    part["ended"] = "running"
    try:
        for line in process.stdout:
            if line.startswith("{"):
                part["rows"].append(json.loads(line))
                part["seconds"] = time.monotonic() - started
                save()
        code = process.wait()
    finally:  # Ctrl-C does not reach the part, because it has its own process group
        was_stopped = not timer.is_alive()
        timer.cancel()
        if process.poll() is None:
            stop()
    reader.join(5)
    part["seconds"] = time.monotonic() - started
    part["ended"] = "done" if code == 0 else f"stopped after {limit:.0f} s" if was_stopped else "failed"
    part["stderr"] = "".join(complaints[-40:]) if code else ""
    said = complaints[-8:] if part["ended"] == "failed" else ()
    print(f"   {part['ended']}, {len(part['rows'])} rows, {part['seconds']:.0f} s", *said, flush=True)


def is_right(found: Row) -> bool:
    value = found["value"]
    return found.get("at_least", value) <= value <= found.get("at_most", value)


def machine(args: argparse.Namespace) -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    noted = REPOSITORY / ".whl" / "commit"  # gpu_wheels.sh wrote it, for a copy without git's folder
    has_cuda = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if has_cuda else platform.processor() or "cpu",
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if has_cuda else None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": _said("git", "-C", str(REPOSITORY), "describe", "--always", "--dirty")
        or (noted.read_text().strip() if noted.exists() else None),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
    }


def _said(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    found = results["machine"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    lines = [f"{found['device']}, driver {found['driver']}, {found['date']}, commit {found['commit']}; {versions}.", ""]
    lines += [f"    {found['command']}", ""]
    for name, part in results["parts"].items():
        lines += [f"**{name}** ({part['seconds']:.0f} s, {part['ended']})", "", "| | | should be |", "|---|---|---|"]
        for each in part["rows"]:
            bound = "".join(
                f"{sign} {each[key]:.3g}" for key, sign in (("at_most", "<="), ("at_least", ">=")) if key in each
            )
            wrong = "" if is_right(each) else " NOT"
            note = f" ({each['note']})" if "note" in each else ""
            lines.append(f"| {each['what']}{note} | {each['value']:.4g} {each['unit']} | {bound}{wrong} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
