"""Fixtures shared by all tests: tiny models in the layouts people have on their disks, made from seeds.

A donor (Llama) and a base (Llamba) of the same width, depth, heads and vocabulary, and a tokenizer for both.
"""

import copy
import gc
import itertools
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model_preparation.llamba import LlambaConfig, LlambaForCausalLM
from model_preparation.llamba.donor_kinds import DonorKind
from tests.preloaded import preloaded_python, renew_threads, skip_side_work, use_large_pages

# Two threads beside another busy process are many times slower than one.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # processes started here need no more either
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive the forks below
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # a forked process cannot always load weights in threads
# A shell's background jobs ignore SIGINT, and so would their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.executable = str(Path(sys.prefix, "bin", "python3"))  # a forked worker's executable is no interpreter

# The time limit for what may hang. Nothing takes so long, even on a busy machine. Nothing is measured by it.
HANG_SECONDS = 900
HAS_CUDA = torch.cuda.is_available()
PACKAGE = Path(__file__).parents[1] / "model_preparation"
VOCABULARY = 260  # 256 bytes and four special tokens


# For a test that runs the same code on the CPU and on a GPU. It gives the test the argument `device`.
on_devices = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="on_cpu"), pytest.param("cuda", id="on_gpu", marks=pytest.mark.gpu)]
)


# The same examples in every run, so a test never fails by chance because of a rare example.
hypothesis.settings.register_profile("same examples", derandomize=True, deadline=None)
hypothesis.settings.load_profile("same examples")

# Begun first, in this order, so that no worker still runs a long file when the others have ended.
LONGEST = (
    *("test_real_model.py", "test_readme.py", "test_ray_jobs.py", "test_processes.py", "test_search.py"),
    *("test_evaluate.py", "test_imports.py", "test_experiment.py", "test_distill.py", "test_examples.py"),
    *("test_faults.py", "test_hf_format.py", "test_power_failure.py", "test_donor_kinds.py", "test_heal.py"),
    *("test_quickstart.py", "test_heads.py", "test_rebuild.py", "test_legacy_layers.py"),
)


# This file lists the test functions that take longer than SLOW_SECONDS for all their parameters together.
# All tests that need `put_python` are slow too.
SLOW_TESTS = Path(__file__).with_name("slow_tests.txt")
SLOW_SECONDS = 0.3


def pytest_addoption(parser):
    parser.addoption(
        "--quick", action="store_true", help=f"omit tests in {SLOW_TESTS.name} and all that need put_python"
    )
    parser.addoption(
        "--note_slow_tests", action="store_true", help=f"write {SLOW_TESTS.name} anew; with --quick, add to it"
    )


def pytest_collection_modifyitems(config, items):
    """Leave out slow tests with --quick, begin with LONGEST, and skip gpu tests without a CUDA device."""
    if config.getoption("quick"):
        slow = set(SLOW_TESTS.read_text().split())
        left_out = [item for item in items if function_of(item) in slow or "put_python" in item.fixturenames]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if not HAS_CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish():
    skip_side_work()
    gc.collect()
    gc.freeze()  # what is here stays, so neither we nor the commands forked from here look through it for garbage
    gc.set_threshold(20_000)  # Python's 700 would have each test collect many times


@pytest.fixture(scope="module", autouse=True)
def cheap_forks() -> None:
    use_large_pages()


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("note_slow_tests"):
        seconds: Counter = Counter()
        for report in itertools.chain(*terminalreporter.stats.values()):
            if isinstance(report, pytest.TestReport):
                seconds[function_of(report)] += report.duration
        slow = {name for name in seconds if seconds[name] > SLOW_SECONDS}
        slow |= set(SLOW_TESTS.read_text().split()) if config.getoption("quick") else set()
        SLOW_TESTS.write_text("\n".join(sorted(slow)) + "\n")


def function_of(test: pytest.Item | pytest.TestReport) -> str:
    """Its id without parameters."""
    return test.nodeid.partition("[")[0]


def tiny_config(**changes) -> LlambaConfig:
    """A Llamba of 4 layers, width 32 and 2 heads of 16, with `changes`."""
    fields = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_layer": 4,
        "ssm_cfg": {"d_state": 8, "n_v_heads": 2, "n_qk_heads": 2, "chunk_size": 8},
        "mlp_cfg": {"intermediate_size": 48},
    }
    return LlambaConfig(**{**fields, **changes})


def tiny_llama_cfg() -> dict:
    """`llama_cfg` of grafted layers that fit `tiny_config`."""
    return {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 40,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def donor_fields(kind: DonorKind, **changes) -> dict:
    """Fields of a tiny donor's config, for any kind. The shape is that of `make_donor`, without windows."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 40,
        "rms_norm_eps": 1e-4,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    if "sliding_window" in kind.fields:
        fields["sliding_window"] = None
    if kind.model_type != "qwen2":  # Qwen2's config has no head_dim
        fields["head_dim"] = 16
    return fields | changes


def old_spelling(fields: dict) -> dict:
    """A config.json as it was written before transformers 5."""
    fields = dict(fields)
    rope = fields.pop("rope_parameters")
    fields["rope_theta"] = rope.pop("rope_theta")
    fields["rope_scaling"] = {"type": rope.pop("rope_type"), **rope} if len(rope) > 1 else None
    for name in ("layer_types", "dtype"):
        if (value := fields.pop(name, None)) is not None and name == "dtype":
            fields["torch_dtype"] = value
    return fields


def seeded(model: torch.nn.Module, seed: int = 0, scale: float = 0.2) -> torch.nn.Module:
    """`model` in eval mode with weights large enough for its outputs to be told apart."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            parameter.copy_(1 + noise if "norm" in name else noise)
    return model.eval()


def on(device: str, model: torch.nn.Module) -> torch.nn.Module:
    """`model` on a device: itself, or a copy."""
    return model if device == "cpu" else copy.deepcopy(model).to(device)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, as in GPT-2's alphabet; four special ones after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def make_donor(folder: Path) -> Path:
    """A Llama's folder as transformers saves it, with tokenizer and generation config."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=40,
        rms_norm_eps=1e-4,
        max_position_embeddings=512,
        bos_token_id=256,
        eos_token_id=257,
    )
    seeded(LlamaForCausalLM(config), seed=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_base(folder: Path) -> Path:
    """A Llamba's folder as upstream publishes it: config.json and pytorch_model.bin, no tokenizer."""
    folder.mkdir()
    model = seeded(LlambaForCausalLM(tiny_config()), seed=2)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    upstream_config = {
        "model_type": "llamba",
        "vocab_size": VOCABULARY,
        "tie_embeddings": False,
        "pad_vocab_size_multiple": 8,
        "lm_head_bias": False,
        "d_model": 32,
        "n_layer": 4,
        "resid_dropout": 0.0,
        "norm_epsilon": 1e-5,
        "mlp_cfg": {"intermediate_size": 48, "bias": False, "act_fn": "silu"},
        "ssm_cfg": {"d_state": 8, "n_v_heads": 2, "n_qk_heads": 2, "expand": 1, "chunk_size": 8},
    }
    (folder / "config.json").write_text(json.dumps(upstream_config))
    return folder


def run_command(name: str, *args: object, cwd: Path = PACKAGE, **env: str) -> subprocess.CompletedProcess:
    """Run a command of the package in a process of its own, and return its exit code and what it printed.

    The process is forked from this one, so torch is there already. `run_fresh_command` starts an interpreter.
    """
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        child = os.fork()
        if child == 0:
            os.dup2(stdout.fileno(), 1)
            os.dup2(stderr.fileno(), 2)
            _become_command(name, args, cwd, env)
        status = os.waitpid(child, 0)[1]
        texts = []
        for stream in (stdout, stderr):
            stream.seek(0)
            texts.append(stream.read().decode())
    return subprocess.CompletedProcess([name, *args], os.waitstatus_to_exitcode(status), *texts)


def start_command(name: str, *args: object, log: Path, **env: str) -> BaseProcess:
    """`run_command`, without waiting for its end; what it prints goes into the file `log`."""

    def run() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        _become_command(name, args, PACKAGE, env)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def _become_command(name: str, args: tuple, cwd: Path, env: dict[str, str]) -> NoReturn:
    """Be `python NAME.py ARGS` from here on; the forked child's half of `run_command`."""
    code: Any = 1
    try:
        signal.alarm(HANG_SECONDS)
        renew_threads()
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ |= {"HF_HUB_OFFLINE": "1", **env}
        os.chdir(cwd)
        path = PACKAGE / f"{name}.py"
        sys.argv = [str(path), *map(str, args)]
        if HAS_CUDA:  # which no forked process can use
            os.execv(sys.executable, [sys.executable, *sys.argv])
        runpy.run_path(str(path), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def wait_until(happened: Callable[[], object], *, alive: Callable[[], object] = lambda: True) -> None:
    """Wait for an event. Fails when `alive` says that the event cannot happen any more."""
    deadline = time.monotonic() + HANG_SECONDS
    while True:
        began = time.process_time()
        if happened():
            return
        assert alive() or happened(), "what was waited for cannot happen any more"
        assert time.monotonic() < deadline, "what was waited for did not happen"
        # Looking all the time would take the core that the event needs.
        time.sleep(max(0.005, 10 * (time.process_time() - began)))


def run_fresh_command(
    name: str, *args: object, cwd: Path = PACKAGE, python: str | Path = sys.executable, **env: str
) -> subprocess.CompletedProcess:
    """`run_command`, in a new interpreter."""
    return run_python(str(PACKAGE / f"{name}.py"), *map(str, args), cwd=cwd, python=python, **env)


def run_python(*args: str, cwd: Path, python: str | Path = sys.executable, **env: str) -> subprocess.CompletedProcess:
    """Run `python`, by default this interpreter, with `args` in the folder `cwd`, offline."""
    if args[0] == "-c":  # the imports of this code take a fifth less if garbage is collected seldom
        args = ("-c", f"import gc\ngc.set_threshold(100_000)\n{args[1]}", *args[2:])
    return subprocess.run(
        [str(python), *args],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


@pytest.fixture(scope="session")
def put_python() -> Iterator[Callable[[Path], None]]:
    """Puts at a path a `python` that has imported torch already, and nothing of ours (tests/preloaded.py)."""
    with preloaded_python() as put:
        yield put


@pytest.fixture(scope="session")
def quick_python(put_python, tmp_path_factory) -> Path:
    """The path of a `python` from `put_python`."""
    path = tmp_path_factory.mktemp("bin") / "python"
    put_python(path)
    return path


@pytest.fixture(scope="module")
def quick_children(request) -> Iterator[None]:
    """The processes that commands start need not import torch again either."""
    with pytest.MonkeyPatch.context() as patched:
        if not request.config.getoption("quick"):  # quick tests start no such processes
            patched.setattr(sys, "executable", str(request.getfixturevalue("quick_python")))
        yield


def copy_repository(target: Path) -> Path:
    """Copy the files of the working tree that git does not ignore into the folder `target`."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=PACKAGE.parent, capture_output=True, check=True)
    for name in listed.stdout.decode().splitlines():
        source = PACKAGE.parent / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


def assert_refused(result: subprocess.CompletedProcess, *words: str, code: int = 1) -> None:
    """The command ended with `code`. Its stderr has each of `words`, and no traceback."""
    assert result.returncode == code, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture(scope="session")
def donor_dir(tmp_path_factory) -> Path:
    return make_donor(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny-llamba")


@pytest.fixture(scope="session")
def layers_dir(donor_dir, tmp_path_factory) -> Path:
    """The donor's layers, extracted. Copy it before changing anything in it."""
    from model_preparation import extract_layers

    folder = tmp_path_factory.mktemp("extracted") / "layers"
    extract_layers(str(donor_dir), folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint_dir(base_dir, layers_dir, tmp_path_factory) -> Path:
    """A checkpoint of the tiny pair with layers 1 and 3 grafted. Copy it before changing anything in it."""
    from model_preparation import build_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints") / "tiny_1_3"
    build_checkpoint(str(base_dir), [3, 1], layers_dir, folder, description="a tiny pair")
    return folder


@pytest.fixture(params=["xfs", "btrfs"])
def sharing_disk(request, tmp_path) -> Iterator[Path]:
    """The root of a new file system on which files can share extents, mounted from an image; skipped without root."""
    mkfs, image, mounted = shutil.which(f"mkfs.{request.param}"), tmp_path / "image", tmp_path / "mounted"
    if os.geteuid() != 0 or mkfs is None:
        pytest.skip(f"needs root and mkfs.{request.param}")
    with image.open("wb") as file:
        file.truncate(320 << 20)
    mounted.mkdir()
    subprocess.run([mkfs, "-q", str(image)], check=True, capture_output=True)
    if subprocess.run(["mount", "-o", "loop", image, mounted], capture_output=True).returncode != 0:
        pytest.skip("no loop device can be mounted here")
    yield mounted
    subprocess.run(["umount", mounted], check=True)
    image.unlink()
