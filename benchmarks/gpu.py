"""Everything that needs a GPU, in one run that may be cut short: first whether it is right, then how fast it is.

Each part is a process of its own with a time limit. After each, results.json and results.md in --output_dir have all
that was measured, also by a part that was stopped. Weights are random, made on the device from a seed: no model is
needed. What a part needs and is not installed is named in its row. On a CPU with --shape tiny it shows that it works.

    python benchmarks/gpu.py --output_dir results
    python benchmarks/gpu.py --output_dir results --shape tiny --device cpu
"""

import argparse
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from model_preparation.llamba import LlambaConfig, LlambaForCausalLM
from model_preparation.llamba.cache_llamba import CACHE_NAME, LlambaCache
from model_preparation.llamba.donor_kinds import KINDS
from model_preparation.llamba.ssd import scan

REPOSITORY = Path(__file__).resolve().parents[1]
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 128, "layers": 4, "mlp": 256, "heads": 4, "kv_heads": 2, "vocabulary": 512, "grafts": [1, 3]},
    "1b": {"width": 2048, "layers": 16, "mlp": 8192, "heads": 32, "kv_heads": 8, "vocabulary": 128256},
    "8b": {"width": 4096, "layers": 32, "mlp": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 128256},
}
GRAFTS = {"1b": [3, 6, 8, 10], "8b": [11, 13, 17, 21]}
CONTEXTS = {"tiny": [64, 256], "1b": [1024, 8192, 32768], "8b": [1024, 8192, 32768]}
SEGMENT = 4096  # tokens of a prompt that run at once
PACKAGES = ("torch", "transformers", "accelerate", "peft", "lm_eval", "flash-linear-attention", "triton")
CANDIDATES, QUESTIONS = 40 * 20, 1000  # of the genetic search that the cost is told for

Row = dict[str, Any]


def row(what: str, value: float, unit: str, **more: Any) -> Row:
    """One measured value. `at_most` or `at_least` is what it should be; `note` says more."""
    return {"what": what, "value": value, "unit": unit, **more}


# The models.


def configs(shape: str, grafted: bool) -> tuple[LlamaConfig, LlambaConfig]:
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
    layers = s.get("grafts", GRAFTS.get(shape)) if grafted else []
    llamba = LlambaConfig(
        vocab_size=s["vocabulary"],
        d_model=s["width"],
        n_layer=s["layers"],
        mlp_cfg={"intermediate_size": s["mlp"]},
        ssm_cfg={"n_v_heads": s["heads"], "n_qk_heads": s["heads"], "d_state": 64},
        llama_layers=layers,
        llama_cfg=KINDS["llama"].settings(donor) if layers else None,
    )
    return donor, llamba


def make(name: str, shape: str, device: str, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    """The "base", the "graft" or the "donor" of a shape, its weights drawn on the device."""
    donor, llamba = configs(shape, grafted=name == "graft")
    with torch.device("meta"):
        model = LlamaForCausalLM(donor) if name == "donor" else LlambaForCausalLM(llamba)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for module in list(model.modules()):
        for child, rotary in module.named_children():
            if isinstance(rotary, LlamaRotaryEmbedding):  # its buffers are computed, not drawn
                setattr(module, child, LlamaRotaryEmbedding(rotary.config).to(device))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(0, 0.02, generator=generator)
            if "norm" in parameter_name:
                parameter.add_(1)
    model = model.to(dtype).eval()
    model.tie_weights()
    return model


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
    """Run a prompt into the cache; the next token, (batch, 1)."""
    for part in ids.split(SEGMENT, dim=1):
        logits = model(part, **{CACHE_NAME: cache}, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1:].argmax(-1)


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(device: str, run: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of `run`, after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def copy_bandwidth(device: str) -> float:
    """Bytes per second that a large copy on the device moves, read and written."""
    source = torch.empty(2**31 if device.startswith("cuda") else 2**27, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(device, lambda: target.copy_(source))


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()


# The parts, in order of worth.


def part_tests(args: argparse.Namespace) -> Iterator[Row]:
    """The project's own tests that need a GPU."""
    if importlib.util.find_spec("pytest") is None:
        yield row("pytest is not installed", 0, "")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    yield row("pytest -m gpu, exit code", done.returncode, "", at_most=0, note=last.strip("= "))


@torch.no_grad()
def part_correct(args: argparse.Namespace) -> Iterator[Row]:
    """Logits and tokens against the CPU in float32, and every way to run a prompt against the plain one."""
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
            on_device.load_state_dict(on_cpu.state_dict())
        on_device = on_device.float()
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
    """The optional kernel against our scan in float64, forward and backward."""
    if importlib.util.find_spec("fla") is None or not device.startswith("cuda"):
        yield row("flash-linear-attention is not installed, or there is no CUDA device", 0, "")
        return
    generator = torch.Generator().manual_seed(0)
    x, B, C = (torch.randn(2, 300, 4, 64, generator=generator) for _ in range(3))
    decay = -torch.nn.functional.softplus(torch.randn(2, 300, 4, generator=generator))

    def run(to: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        inputs = [to(t).requires_grad_() for t in (x, decay, B, C)]
        with torch.enable_grad():
            y, state = scan(*inputs, 64)
            return [y, state, *torch.autograd.grad(y.square().sum() + state.square().sum(), inputs)]

    names = ("output", "state", "gradient of x", "of the decay", "of B", "of C")
    for name, found, wanted in zip(names, run(lambda t: t.cuda()), run(lambda t: t.double()), strict=True):
        yield row(f"flash-linear-attention, {name}", error(found.detach(), wanted.detach()), "relative", at_most=1e-2)


@torch.inference_mode()
def part_decode(args: argparse.Namespace) -> Iterator[Row]:
    """Prompts and single tokens of base, graft and donor, in bfloat16, and the share of the bandwidth's limit."""
    dtype = torch.bfloat16
    bandwidth = copy_bandwidth(args.device)
    yield row("copy on the device", bandwidth / 1e9, "GB/s")
    for name in ("base", "graft", "donor"):
        model = make(name, args.shape, args.device, dtype)
        if args.compile:
            for layer in (model.model if name == "donor" else model.backbone).layers:
                layer.compile()
        head = (model.model.embed_tokens if name == "donor" else model.backbone.embedding).weight
        weights = sum(parameter.nbytes for parameter in model.parameters()) - head.nbytes  # one row of it is read
        for batch, context in itertools.product((1, 32), CONTEXTS[args.shape]):
            needed = batch * context * _bytes_per_token(model)
            if args.device.startswith("cuda") and needed > 0.4 * torch.cuda.mem_get_info()[0]:
                yield row(f"{name}, batch {batch}, context {context}: left out", needed / 1e9, "GB of K/V")
                continue
            ids = tokens(batch, context, model)
            cache = cache_of(model)
            wait(args.device)
            started = time.perf_counter()
            following = read(model, ids, cache)
            wait(args.device)
            taken = time.perf_counter() - started
            if batch == 1:  # the first run of a shape also compiles kernels
                taken = seconds(args.device, lambda ids=ids, model=model: read(model, ids, cache_of(model)), repeats=3)
                yield row(f"{name}: prompt of {context}", batch * context / taken, "tokens/s")

            def step(model: Any = model, following: Any = following, cache: Any = cache) -> None:
                model(following, **{CACHE_NAME: cache}, use_cache=True)

            took = seconds(args.device, step, repeats=20)
            limit = (weights + cache_bytes(cache)) / bandwidth  # seconds, if nothing but memory set the pace
            goal = {"at_least": 0.8} if batch == 1 and name != "graft" and args.shape == "8b" else {}
            where = f"{name}, batch {batch}, context {context}"
            yield row(f"{where}: token", 1000 * took, "ms")
            yield row(f"{where}: share of the limit by bandwidth", limit / took, "", **goal)
        if args.device.startswith("cuda"):
            yield row(f"{name}: peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
            torch.cuda.reset_peak_memory_stats()
        del model


def _bytes_per_token(model: torch.nn.Module) -> int:
    config = model.config
    layers = config.num_hidden_layers if isinstance(model, LlamaForCausalLM) else len(config.llama_layers)
    return 2 * layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


@torch.inference_mode()
def part_scores(args: argparse.Namespace) -> Iterator[Row]:
    """Questions per second, ours against lm-eval's own model, on requests as long as MMLU's; the cost of a search."""
    if importlib.util.find_spec("lm_eval") is None:
        yield row("lm_eval is not installed", 0, "")
        return
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from model_preparation.evaluation.scoring import ScoringLM

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>", pad_token="<unk>")
    model = make("graft", args.shape, args.device, torch.bfloat16)
    count = 200 if args.shape != "tiny" else 8
    for shots, shared_length in ((0, 20), (5, 550)):
        requests = mmlu_like(count, shared_length, model.config.vocab_size)
        answers, per_second = {}, {}
        sides = {
            "ours": ScoringLM(model, tokenizer, 32),
            "stock": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=32),
        }
        for side, lm in sides.items():
            wait(args.device)
            started = time.perf_counter()
            answers[side] = lm._loglikelihood_tokens(requests, disable_tqdm=True)
            wait(args.device)
            per_second[side] = count / (time.perf_counter() - started)
            yield row(f"{shots}-shot, {side}", per_second[side], "questions/s")
        goal = {"at_least": 4} if shots == 5 and args.shape == "8b" else {}
        yield row(f"{shots}-shot, ours / stock", per_second["ours"] / per_second["stock"], "times", **goal)
        differing = sum(_choice(answers["ours"], n) != _choice(answers["stock"], n) for n in range(count))
        yield row(f"{shots}-shot, choices that differ", differing, f"of {count}")
        if shots == 0:
            hours = CANDIDATES * QUESTIONS / per_second["ours"] / 3600
            note = "with every candidate run alone; a search runs what candidates share once"
            yield row(f"search of {CANDIDATES} sets, {QUESTIONS} questions", hours, "hours", note=note)


def mmlu_like(count: int, shared_length: int, vocabulary: int) -> list[tuple[Any, list[int], list[int]]]:
    """Requests of `count` questions with four choices of one token; 20 questions share a beginning."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> list[int]:
        return torch.randint(1, vocabulary, (length,), generator=generator).tolist()

    requests, shared, choices = [], [], [1, 2, 3, 4]
    for number in range(count):
        shared = draw(shared_length) if number % 20 == 0 else shared
        context = shared + draw(int(torch.randint(40, 200, (1,), generator=generator)))
        requests += [((f"question {number}", f"choice {choice}"), context, [choice]) for choice in choices]
    return requests


def _choice(answers: list[tuple[float, bool]], number: int) -> int:
    values = [value for value, _ in answers[4 * number : 4 * number + 4]]
    return max(range(4), key=values.__getitem__)


def part_heal(args: argparse.Namespace) -> Iterator[Row]:
    """One training step of a graft in bfloat16: LoRA on every layer, and the grafted layers alone; and its memory."""
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
    """From the disk to the device: a folder of format hf, against reading the files and copying the bytes."""
    import tempfile

    from transformers import AutoModelForCausalLM

    shape = "1b" if args.shape == "8b" else args.shape
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        make("graft", shape, args.device, torch.bfloat16).save_pretrained(folder)
        files = list(Path(folder).glob("*.safetensors"))
        size_bytes = sum(path.stat().st_size for path in files)

        def plain() -> None:
            for path in files:
                torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).to(args.device)

        def load() -> None:
            AutoModelForCausalLM.from_pretrained(folder, device_map=args.device, dtype=torch.bfloat16)

        for name, run in (("reading and copying", plain), ("loading the model", load)):
            yield row(f"{name}, {size_bytes / 1e9:.1f} GB", size_bytes / seconds(args.device, run, 3) / 1e9, "GB/s")


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


# Name, seconds at the most.
PARTS: dict[str, tuple[Callable[[argparse.Namespace], Iterator[Row]], int]] = {
    "tests": (part_tests, 150),
    "correct": (part_correct, 90),
    "decode": (part_decode, 240),
    "scores": (part_scores, 180),
    "heal": (part_heal, 90),
    "load": (part_load, 60),
    "profile": (part_profile, 60),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="results.json and results.md go here")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=13, help="for all parts together")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--compile", action="store_true", help="decode with torch.compile on every layer")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in this process, a row a line
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.part:
        if args.device == "cpu":
            torch.set_num_threads(1)
        for found in PARTS[args.part][0](args):
            print(json.dumps(found), flush=True)
        return
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"torch sees no CUDA device here. Try --shape tiny --device cpu; torch is {torch.__version__}")
    results = {"machine": machine(args), "parts": {}}
    until = time.monotonic() + 60 * args.minutes
    failed = []
    for name in args.parts:
        limit = min(PARTS[name][1], until - time.monotonic())
        if limit > 5:
            results["parts"][name] = run_part(name, limit)
            failed += [f"{name}: {row['what']}" for row in results["parts"][name]["rows"] if not is_right(row)]
            failed += [f"{name}: {results['parts'][name]['ended']}"] * (results["parts"][name]["ended"] != "done")
        else:
            results["parts"][name] = {"rows": [], "seconds": 0, "ended": "no time was left"}
        (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (args.output_dir / "results.md").write_text(table(results))
    print(table(results))
    print(f"Results: {args.output_dir / 'results.md'}")
    if failed:
        sys.exit("Not as it should be:\n" + "\n".join(failed))


def run_part(name: str, limit: float) -> dict[str, Any]:
    """Run a part for at most `limit` seconds; its rows, also those of one that was stopped."""
    print(f"{name} (at most {limit:.0f} s)", flush=True)
    started = time.monotonic()
    command = [sys.executable, __file__, *sys.argv[1:], "--part", name]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])),
    }
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    timer = threading.Timer(limit, process.kill)
    timer.start()
    complaints: list[str] = []
    reader = threading.Thread(target=lambda: complaints.extend(process.stderr), daemon=True)
    reader.start()
    rows = [json.loads(line) for line in process.stdout if line.startswith("{")]
    code = process.wait()
    reader.join(5)
    ended = "done" if code == 0 else f"stopped after {limit:.0f} s" if not timer.is_alive() else "failed"
    timer.cancel()
    taken = time.monotonic() - started
    print(f"   {ended}, {len(rows)} rows, {taken:.0f} s", *complaints[-8:] if ended == "failed" else (), flush=True)
    return {"rows": rows, "seconds": taken, "ended": ended, "stderr": "".join(complaints[-40:]) if code else ""}


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
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    has_cuda = args.device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name() if has_cuda else platform.processor() or "cpu",
        "driver": _driver() if has_cuda else None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": git.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
    }


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or None
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
