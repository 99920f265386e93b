"""Fuzzing: damages copies of the files that this project reads, and gives them to all code that reads such files.

A case passes if it ends, with or without SurgeryError, within the limits of time and memory. It must not open
a file outside the models' folders, open a socket, start a process, or unpickle a class. Cases run in forked
children, so a crash is one finding and does not end the script. Prints the number of cases, and each finding
with the number of its case. `--only` repeats the case with this number.

    python benchmarks/fuzz.py --seconds 3600 --seed 1

mutations.py makes most of the faults. A coverage-guided fuzzer such as atheris would help little: behind the
first checks come compiled parts of torch and tokenizers, which it cannot see into. It would also have to guess
CRCs and lengths.
"""

import argparse
import os
import resource
import select
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.mutations import mutate

CASES_PER_CHILD = 300
CASE_SECONDS = 20  # of processor time
HANG_SECONDS = 60  # by the clock, for a case that only waits. The time while this process is stopped does not count
MEMORY_BYTES = 2 << 30  # address space of a case, in addition to that of the libraries
SUSPICIOUS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "pickle.find_class"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, metavar="N", help="the number of the first case")
    parser.add_argument("--only", type=int, metavar="N", help="run case N here, with its traceback")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        work = Path(folder).resolve()
        make_models(work)
        (work / "secret.json").write_text("{}")
        if args.only is not None:
            run_case(work, args.seed, args.only)
            print(f"Case {args.only} passed.")
            return
        ended = fuzz(work, args.seed, args.start, args.seconds)
    findings = {outcome: count for outcome, count in ended.items() if outcome not in ("read", "refused")}
    print(f"{sum(ended.values())} cases: {ended['refused']} refused, {ended['read']} read, {findings or 'no findings'}")
    sys.exit(1 if findings else 0)


def fuzz(work: Path, seed: int, start: int, seconds: float) -> Counter[str]:
    """Run cases in children until the time is over. Return how often each outcome came."""
    ended: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    case = start
    while time.monotonic() < deadline:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            run_child(work, seed, case, writer, deadline)
        os.close(writer)
        outcomes = read_outcomes(reader, child)
        status = os.waitpid(child, 0)[1]
        for number, outcome in enumerate(outcomes):
            ended[outcome] += 1
            if outcome not in ("read", "refused"):
                print(f"case {case + number}: {outcome}", flush=True)
        case += len(outcomes)
        if status:
            code = os.waitstatus_to_exitcode(status)
            crash = f"crash: {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
            print(f"case {case}: {crash}", flush=True)
            ended[crash] += 1
            case += 1
            for folder in ("base", "sharded", "layers", "checkpoint"):
                restore(work, folder)
    print(f"the next case is {case}", flush=True)
    return ended


def read_outcomes(reader: int, child: int) -> list[str]:
    """The lines that a child writes, one per case. A child that is silent for HANG_SECONDS is killed."""
    text = b""
    silent_seconds = 0
    while True:
        if select.select([reader], [], [], 1)[0]:
            data = os.read(reader, 65536)
            if not data:
                os.close(reader)
                return text.decode().splitlines()
            text += data
            silent_seconds = 0
        else:
            silent_seconds += 1
            if silent_seconds == HANG_SECONDS:
                os.kill(child, signal.SIGKILL)


def run_child(work: Path, seed: int, first: int, writer: int, deadline: float) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for case in range(first, first + CASES_PER_CHILD):
        if time.monotonic() > deadline:
            break
        signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
        try:
            outcome = run_case(work, seed, case)
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {error!s:.150}"
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(writer, (" ".join(outcome.encode("ascii", "replace").decode().split()) + "\n").encode())
    os._exit(0)


def run_case(work: Path, seed: int, case: int) -> str:
    """Damage one file, give it to all code that reads such files, and restore it. Return "read" or "refused"."""
    from model_preparation.errors import SurgeryError

    rng = Random(f"{seed} {case}")
    scenario = rng.choice(sorted(SCENARIOS))
    folder = work / scenario
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".txt", ".md"))
    path = rng.choice([path for path in paths if path.parent == folder or rng.random() < 0.2] or paths)
    outcome = "read"
    whole = path.read_bytes()
    watch = Watch(work, list(SCENARIOS))
    try:
        damage(path, rng)
        if not path.is_symlink() and path.is_file() and path.read_bytes() == whole:
            return outcome  # the mutation changed nothing
        for action in SCENARIOS[scenario]:
            try:
                with watch:
                    action(work)
            except SurgeryError:
                outcome = "refused"
    finally:
        restore(work, scenario, path)
    if watch.seen:
        raise AssertionError(f"opened or ran {sorted(set(watch.seen))[:3]}")
    return outcome


def damage(path: Path, rng: Random) -> None:
    kind = rng.randrange(40)
    if kind > 3:
        path.write_bytes(mutate(path.name, path.read_bytes(), rng))
        return
    path.unlink()
    if kind == 0:
        path.symlink_to(
            rng.choice([path.parents[1] / "secret.json", "/etc/hostname", "/dev/zero", path.name, path.parent])
        )
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        path.mkdir()


def restore(work: Path, scenario: str, path: Path | None = None) -> None:
    """Restore the damaged file `path`. If it is None, restore the whole folder of the scenario."""
    if path is None:
        shutil.rmtree(work / scenario, ignore_errors=True)
        shutil.copytree(work / "whole" / scenario, work / scenario)
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    shutil.copy(work / "whole" / path.relative_to(work), path)


class Watch:
    """Records, while a block runs, files opened outside some folders and the libraries, and everything SUSPICIOUS."""

    current: "Watch | None" = None
    installed = False

    def __init__(self, work: Path, folders: Sequence[str]):
        """`folders` are the folders in `work` that may be read. For example, planning a graft reads base and layers."""
        self.seen: list[str] = []
        self.inside = tuple(f"{os.path.realpath(work / name)}{os.sep}" for name in folders)
        libraries = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
        self.libraries = (*(f"{os.path.realpath(library)}{os.sep}" for library in libraries), *_SYSTEM)
        self.libraries += (f"{Path(__file__).resolve().parents[1]}{os.sep}",)
        if not Watch.installed:
            Watch.installed = True
            sys.addaudithook(lambda event, args: Watch.current and Watch.current.note(event, args))

    def __enter__(self) -> None:
        Watch.current = self

    def __exit__(self, *exception) -> None:
        Watch.current = None

    def note(self, event: str, args: tuple) -> None:
        if event in SUSPICIOUS:
            self.seen.append(f"{event} {args!r:.100}")
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            Watch.current = None  # realpath itself may be audited
            path = os.path.realpath(os.fsdecode(args[0]))
            Watch.current = self
            if not path.startswith((*self.inside, *self.libraries)):
                self.seen.append(f"open {path}")


_SYSTEM = ("/proc/", "/sys/devices/system/", "/dev/null", "/dev/urandom", "/usr/lib/", "/usr/share/")
_SYSTEM += ("/etc/ld.so.cache",)


def read_base(name: str, work: Path) -> None:
    from model_preparation.checkpoint.model_configs import read_config, read_generation_config
    from model_preparation.hub.sources import resolve
    from model_preparation.io.tensors.sharded_weights import TensorFiles

    folder = resolve(str(work / name)).folder
    read_config(folder)
    read_generation_config(folder)
    files = TensorFiles(folder)
    files.paths()
    for tensor in files.ranges:
        touch(files[tensor])
        read_whole(files.ranges[tensor])


def plan_with(name: str, work: Path) -> None:
    from model_preparation.checkpoint.graft_plan import plan
    from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer

    graft = plan(str(work / name), [1], work / "layers")
    graft.describe()
    load_tokenizer(graft.tokenizer)


def read_layers(work: Path) -> None:
    from model_preparation.checkpoint.layer_store import LayerStore

    store = LayerStore(work / "layers")
    for index in store.layers:
        for place in store.ranges(index).values():
            read_whole(place)
    _ = store.config
    store.faults()
    store.check(list(store.layers))


def read_checkpoint(work: Path) -> None:
    from model_preparation.checkpoint.load import load_checkpoint

    model, _ = load_checkpoint(work / "checkpoint")
    for parameter in model.parameters():
        touch(parameter)


def read_whole(place) -> None:
    place.read_into(memoryview(bytearray(place.size_bytes)), 0)


def touch(tensor) -> None:
    if tensor.numel():
        first, last = tensor.reshape(-1)[0].item(), tensor.reshape(-1)[-1].item()
        assert first is not None
        assert last is not None


def verify(work: Path) -> None:
    from model_preparation.checkpoint.verify import verify

    found = verify(work / "checkpoint", str(work / "base"), work / "layers")
    if not found.faults:
        raise AssertionError("no fault was found in a damaged checkpoint")


SCENARIOS: dict[str, list[Callable[[Path], None]]] = {
    "base": [partial(read_base, "base"), partial(plan_with, "base")],
    "sharded": [partial(read_base, "sharded"), partial(plan_with, "sharded")],
    "layers": [read_layers, partial(plan_with, "base")],
    "checkpoint": [read_checkpoint, verify],
}


def make_models(work: Path) -> None:
    """Make two bases (a .bin file, safetensors shards), extracted layers, a checkpoint, and copies to restore from."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from model_preparation import build_checkpoint, extract_layers
    from model_preparation.llamba import LlambaConfig, LlambaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    words = {f"w{i}": i for i in range(60)} | {"<unk>": 60}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    tokenizer.add_special_tokens({"eos_token": "<unk>"})
    donor = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(donor).save_pretrained(work / "donor")
    tokenizer.save_pretrained(work / "donor")
    ssm = {"d_state": 8, "n_v_heads": 2, "n_qk_heads": 2, "chunk_size": 8}
    config = LlambaConfig(vocab_size=64, d_model=16, n_layer=2, ssm_cfg=ssm, mlp_cfg={"intermediate_size": 24})
    base = LlambaForCausalLM(config)
    base.save_pretrained(work / "sharded", max_shard_size="8KB")
    (work / "base").mkdir()
    torch.save(base.state_dict(), work / "base" / "pytorch_model.bin")
    for name in ("config.json", "generation_config.json"):
        shutil.copy(work / "sharded" / name, work / "base")
    extract_layers(str(work / "donor"), work / "layers")
    build_checkpoint(str(work / "base"), [1], work / "layers", work / "checkpoint")
    for scenario in SCENARIOS:
        shutil.copytree(work / scenario, work / "whole" / scenario)


if __name__ == "__main__":
    main()
