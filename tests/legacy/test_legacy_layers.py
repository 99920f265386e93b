"""extract_layers.py --from_legacy: pickled decoder layers become the files an extraction gives, and nothing is run."""

import contextlib
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama import configuration_llama, modeling_llama

from model_preparation import SurgeryError, build_checkpoint
from model_preparation.checkpoint.layer_store import LayerStore
from model_preparation.io.tensors.tensor_ranges import safetensors_ranges
from model_preparation.io.untrusted.pickle_check import HIDDEN_GLOBAL, globals_in
from model_preparation.legacy import import_layers, reader, sandbox
from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import assert_refused, run_command, seeded, tiny_config


class Runs:
    """An object whose pickle calls `function` when it is loaded."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def with_aliases(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer with the aliases that the old program added, so that a Llamba could use the layer."""
    layer.mixer = layer.self_attn
    layer.mixer.out_proj = layer.out_proj = layer.self_attn.o_proj
    return layer


@pytest.fixture
def layers(donor_dir) -> list[torch.nn.Module]:
    """The donor's layers as modules with aliases, to be changed and saved."""
    return [with_aliases(layer) for layer in LlamaForCausalLM.from_pretrained(donor_dir).model.layers]


@pytest.fixture
def old(tmp_path) -> Path:
    """An empty folder for old layer files."""
    folder = tmp_path / "old"
    folder.mkdir()
    return folder


def make_old(layer: torch.nn.Module, monkeypatch) -> torch.nn.Module:
    """As transformers 4.40 made it: classes that are gone by now, a rotary embedding per layer, old config fields."""

    def gone(name, module, parent=object):
        kind = type(name, (parent,), {"__module__": module.__name__})
        monkeypatch.setattr(module, name, kind, raising=False)
        return kind

    new = layer.self_attn.config
    config = gone("LlamaConfig", configuration_llama)()
    vars(config).update(
        vocab_size=new.vocab_size,
        hidden_size=new.hidden_size,
        num_hidden_layers=new.num_hidden_layers,
        num_attention_heads=new.num_attention_heads,
        num_key_value_heads=new.num_key_value_heads,
        intermediate_size=new.intermediate_size,
        rms_norm_eps=new.rms_norm_eps,
        max_position_embeddings=new.max_position_embeddings,
        bos_token_id=new.bos_token_id,
        eos_token_id=new.eos_token_id,
        hidden_act="silu",
        attention_bias=False,
        rope_theta=10000.0,
        rope_scaling=None,
        pretraining_tp=1,
        torch_dtype=torch.float32,
        _name_or_path="/somebody/elses/llama",
        _attn_implementation_internal="sdpa",
        transformers_version="4.40.0",
    )
    attention = layer.self_attn
    attention.__class__ = gone("LlamaSdpaAttention", modeling_llama, modeling_llama.LlamaAttention)
    attention.config = layer.mlp.config = config
    attention.rotary_emb = gone("LlamaLinearScalingRotaryEmbedding", modeling_llama, torch.nn.Module)()
    inv_freq = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    attention.rotary_emb.register_buffer("inv_freq", inv_freq)
    attention.num_heads, attention.rope_theta, attention.hidden_size = 2, 10000.0, 32
    return layer


def save_all(layers, folder: Path) -> None:
    for index, layer in enumerate(layers):
        torch.save(layer, folder / f"layer_{index}.pt")


def import_by_command(folder: Path, out: Path, *args, **env):
    return run_command("extract_layers", "--from_legacy", folder, "--output_dir", out, *args, **env)


@pytest.fixture
def quick_reader(quick_python, monkeypatch):
    """The process that reads is forked from one that has imported torch."""
    monkeypatch.setattr(sys, "executable", str(quick_python))


@pytest.fixture
def reader_after(quick_python, monkeypatch, tmp_path):
    """Like `quick_reader`, but the process first runs the code given to `prepare`."""

    def prepare(code: str) -> None:
        read = "import runpy, sys\ndel sys.argv[1]\n"
        read += "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)\n"
        (tmp_path / "first.py").write_text(code + read)
        (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{quick_python}" "{tmp_path}/first.py" "$@"\n')
        (tmp_path / "python").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))

    return prepare


@pytest.mark.usefixtures("quick_reader")
def test_a_graft_of_imported_layers_is_that_of_extracted_ones(layers, old, layers_dir, base_dir, donor_dir, tmp_path):
    save_all(layers, old)
    shutil.copytree(layers_dir / "tokenizer", old / "tokenizer")
    (old / "rotary_emb.pt").write_bytes(b"no layer")
    result = import_by_command(old, tmp_path / "out", "--trust_pickle", "--verify")
    assert result.returncode == 0, result.stderr
    assert "4 of 4 layers, float32, " in result.stdout
    assert ", 2 heads of 16\n" in result.stdout
    assert result.stdout.splitlines()[-1] == f"Extracted layers are in {tmp_path / 'out'}"
    assert not list(tmp_path.glob("*partial*"))
    extracted, imported = (
        json.loads((place / "metadata.json").read_text()) for place in (layers_dir, tmp_path / "out")
    )
    assert imported["layers"] == extracted["layers"]  # with every file's SHA-256
    assert imported["files"].keys() == extracted["files"].keys()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in layers_dir.iterdir()}
    assert imported["source"]["files"].keys() == {f"layer_{index}.pt" for index in range(4)}
    assert (imported["source"]["id"], imported["source"]["legacy"]) == ("old", True)
    assert imported["source"]["not_run"] == []
    infos = [
        build_checkpoint(str(base_dir), [1, 3], place, tmp_path / name, tokenizer=str(donor_dir))
        for place, name in ((layers_dir, "a"), (tmp_path / "out", "b"))
    ]
    assert infos[0]["files"]["model_state_dict.pt"] == infos[1]["files"]["model_state_dict.pt"]
    assert infos[0]["config"] == infos[1]["config"]
    (tmp_path / "out" / "layer_02.pt").unlink()
    with pytest.raises(SurgeryError, match=f"--from_legacy {old} --trust_pickle"):
        LayerStore(tmp_path / "out").check([2])


@pytest.mark.filterwarnings(
    "ignore:Couldn't retrieve source code"
)  # in the old format, torch.save would store the classes' source code
def test_layers_of_an_old_transformers_in_an_old_file_format(layers, old, layers_dir, tmp_path, monkeypatch, request):
    for index, name in ((1, "llama3_layer_01.pth"), (3, "llama3_layer_03.pth")):
        layer = make_old(layers[index], monkeypatch)
        layer.hook = Runs(os.mkdir, str(tmp_path / f"ran-{index}"))
        layer.self_attn.forward = layer.forward  # as accelerate's hooks do; pickled, it is a call of getattr
        layer.self_attn.rotary_emb.inv_freq._is_shared = True  # pickled, it is a call of _rebuild_from_type_v2
        torch.save(layer, old / name, _use_new_zipfile_serialization=index == 1)
        layer.self_attn = torch.nn.Identity()
    monkeypatch.undo()
    request.getfixturevalue("quick_reader")
    assert {"posix.mkdir", "transformers.models.llama.modeling_llama.LlamaSdpaAttention"} <= globals_in(old / name)
    result = import_by_command(old, tmp_path / "out", "--trust_pickle", "--layers", 1, 3)
    assert result.returncode == 0, result.stderr
    assert "It was not run: __builtin__.getattr, posix.mkdir\n" in result.stdout
    assert not list(tmp_path.glob("ran-*"))
    metadata = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert metadata["total_layers"] == 4
    assert metadata["config"]["rope_parameters"]["rope_theta"] == 10000.0
    for index in (1, 3):
        name = f"layer_{index:02d}.pt"
        assert (tmp_path / "out" / name).read_bytes() == (layers_dir / name).read_bytes()


def test_without_trust_nothing_is_opened(layers, old, tmp_path):
    layers[2].extra = Runs(os.mkdir, str(tmp_path / "ran"))
    for layer, name, protocol in ((layers[0], "layer_0.pt", 2), (layers[2], "layer_2.pt", 4)):
        torch.save(layer, old / name, pickle_protocol=protocol)
    result = import_by_command(old, tmp_path / "out")
    assert_refused(result, "can run code", "posix.mkdir", "LlamaDecoderLayer", f"--from_legacy {old}", "--trust_pickle")
    assert {path.name for path in tmp_path.iterdir()} == {"old"}
    with contextlib.suppress(AttributeError):
        torch.load(old / "layer_2.pt", weights_only=False)
    assert (tmp_path / "ran").is_dir()  # so the file does what it should not


@pytest.mark.parametrize(
    ("pickled", "named"),
    [
        (b"\x80\x04\x8c\x02os\x94\x8c\x06getcwd\x94\x93)R.", "os.getcwd"),
        (b"\x80\x04U\x02osU\x06getcwd\x93)R.", "os.getcwd"),
        (b"\x80\x04T\x02\x00\x00\x00osT\x06\x00\x00\x00getcwd\x93)R.", "os.getcwd"),
        (b"S'os'\nS'getcwd'\n\x93)R.", "os.getcwd"),
        (b"\x80\x04\x8c\x02osq\x05\x8c\x06getcwdq\x0600h\x05h\x06\x93)R.", "os.getcwd"),
        # After the two names, two other texts are pushed and popped.
        (b"\x80\x04\x8c\x02os\x8c\x06getcwd\x8c\x04json\x8c\x05loads00\x93)R.", HIDDEN_GLOBAL),
        # Each name is put into the memo, popped, and taken from the memo.
        (b"\x80\x04\x8c\x02osq\x050h\x05\x8c\x06getcwdq\x060h\x06\x93)R.", HIDDEN_GLOBAL),
    ],
)
def test_every_spelling_of_a_global_is_named_or_called_hidden(pickled, named, tmp_path):
    assert pickle.loads(pickled) == os.getcwd()  # noqa: S301  the file does what it should not
    with zipfile.ZipFile(tmp_path / "layer_0.pt", "w") as archive:
        archive.writestr("layer/data.pkl", pickled)
    assert globals_in(tmp_path / "layer_0.pt") == {named}
    refused = import_by_command(tmp_path, tmp_path / "out", "--layers", 0)
    assert_refused(refused, "can run code", named)


PROBE = """
import json, os, socket, sys

def attempt(act):
    try:
        act()
        return "done"
    except OSError as error:
        return type(error).__name__

def probe(event, _):
    if event == "pickle.find_class":
        found = {
            "tcp": attempt(lambda: socket.create_connection(("127.0.0.1", PORT), 5).close()),
            "unix": attempt(lambda: socket.socket(socket.AF_UNIX).connect("SOCKET")),
            "elsewhere": attempt(lambda: open("ELSEWHERE", "w").close()),
            "here": attempt(lambda: open("mine", "w").close()),
            "secrets": sorted({"HF_TOKEN", "OPENAI_API_KEY", "https_proxy"} & set(os.environ)),
        }
        print(json.dumps(found), file=sys.stderr, flush=True)
        os._exit(7)

sys.addaudithook(probe)
"""


def test_what_runs_while_a_file_is_read_has_no_network_no_secrets_and_one_folder(layers, old, tmp_path):
    """An audit hook plays the role of code that has escaped from the unpickler."""
    torch.save(layers[0], old / "layer_0.pt")
    secrets = {"HF_TOKEN": "s", "OPENAI_API_KEY": "s", "https_proxy": "http://127.0.0.1:1"}
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
        unix.listen()
        probe = PROBE.replace("PORT", str(tcp.getsockname()[1])).replace("SOCKET", str(tmp_path / "socket"))
        (tmp_path / "sitecustomize.py").write_text(probe.replace("ELSEWHERE", str(tmp_path / "elsewhere")))
        paths = f"{tmp_path}:{Path(__file__).parents[2]}"
        free = subprocess.run(
            [sys.executable, "-c", "import pickle; pickle.loads(pickle.dumps(print))"],
            cwd=old,
            env={**os.environ, **secrets, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
        )
        result = import_by_command(old, tmp_path / "out", "--trust_pickle", PYTHONPATH=paths, **secrets)
    can = json.loads(free.stderr)
    assert can == {**dict.fromkeys(("tcp", "unix", "elsewhere", "here"), "done"), "secrets": sorted(secrets)}
    assert_refused(result, "ended with exit code 7 while reading", "layer_0.pt", "Nothing was imported")
    could = json.loads(result.stderr[result.stderr.index("{") : result.stderr.index("}") + 1])
    locks = locks_of(tmp_path)  # not every system has all restrictions of the sandbox
    assert could["tcp"] != "done"
    assert could["unix"] == ("PermissionError" if locks["sockets"] else "done")
    assert could["elsewhere"] == ("PermissionError" if locks["files"] else "done")
    assert could["here"] == "done"
    assert could["secrets"] == []
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*partial*"))


WITHOUT = {
    "namespace": "import ctypes; real = ctypes.CDLL\n"
    "class Fake(real):\n    unshare = staticmethod(lambda flags: -1)\nctypes.CDLL = Fake\n",
    "sockets": "import platform; platform.machine = lambda: 'vax'\n",
}


def locks_of(folder: Path, port: int = 0, before: str = "") -> dict:
    """Which of the sandbox's restrictions hold in a new process.

    "error" says what happens there to a connection to `port`.
    """
    code = before + (
        "import json, runpy, socket, sys, pathlib\n"
        "locks = runpy.run_path(sys.argv[1])['enter'](pathlib.Path('.'))\n"
        "try: socket.create_connection(('127.0.0.1', int(sys.argv[2])), 5)\n"
        "except OSError as error: locks['error'] = type(error).__name__\n"
        "print(json.dumps(locks))\n"
    )
    command = [sys.executable, "-c", code, sandbox.__file__, str(port)]
    return json.loads(subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout)


@pytest.mark.parametrize(("missing", "left"), [("namespace", "sockets"), ("sockets", "namespace")])
def test_either_lock_alone_takes_the_network(missing, left, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        locks = locks_of(tmp_path, server.getsockname()[1], WITHOUT[missing])
    if not locks[left]:
        pytest.skip(f"this system permits no {left} lock")
    assert locks[missing] is False
    assert "error" in locks


def test_where_the_network_cannot_be_taken_it_takes_a_flag(layers, old, reader_after, tmp_path):
    torch.save(layers[0], old / "layer_0.pt")
    reader_after("".join(WITHOUT.values()))
    result = import_by_command(old, tmp_path / "out", "--trust_pickle")
    assert_refused(result, "Nothing was opened", "--allow_network")
    assert not (tmp_path / "out").exists()
    result = import_by_command(old, tmp_path / "out", "--trust_pickle", "--allow_network")
    assert result.returncode == 0, result.stderr


def test_a_killed_reader_is_an_error_and_leaves_nothing(layers, old, tmp_path):
    torch.save(layers[0], old / "layer_0.pt")
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "def kill(event, args):\n"
        "    if event == 'import' and args[0] == 'torch':  # needed to read the file\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "sys.addaudithook(kill)\n"
    )
    paths = f"{tmp_path}:{Path(__file__).parents[2]}"
    result = import_by_command(old, tmp_path / "out", "--trust_pickle", PYTHONPATH=paths)
    assert_refused(result, "was ended by signal 9 while reading", "layer_0.pt")
    assert {path.name for path in tmp_path.iterdir()} == {"old", "sitecustomize.py"}


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """Read in this process: starting the other one takes a second, and the tests above cover it."""

    class Reader:
        def read(self, path):
            try:
                said = reader.read_layer(path, tmp_path / "layer.safetensors")
            except ValueError as error:
                raise SurgeryError(f"{path} {error}") from error
            return safetensors_ranges(tmp_path / "layer.safetensors"), json.loads(json.dumps(said))

    monkeypatch.setattr(import_layers, "legacy_process", lambda folder, allow: contextlib.nullcontext(Reader()))


def refuse(old: Path, tmp_path: Path, *words: str, **options) -> None:
    with pytest.raises(SurgeryError) as refusal:
        import_layers.import_legacy(old, tmp_path / "out", trust_pickle=True, **options)
    for word in words:
        assert word in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("in_this_process")
def test_files_that_hold_something_else_are_named(layers, old, tmp_path):
    path = old / "layer_3.pt"
    torch.save(layers[3].state_dict(), path)
    refuse(old, tmp_path, str(path), "OrderedDict of self_attn.q_proj.weight", "not a LlamaDecoderLayer")
    torch.save(seeded(LlambaForCausalLM(tiny_config())).backbone.layers[3], path)
    refuse(old, tmp_path, str(path), "LlambaDecoderLayer of mixer", "not a LlamaDecoderLayer")
    torch.save([1, 2], path)
    refuse(old, tmp_path, str(path), "list, not")
    path.write_text("layers, layers")
    refuse(old, tmp_path, str(path), "is not a file that torch.save wrote")
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(2)), path)
    refuse(old, tmp_path, str(path), "TorchScript")
    layers[3].self_attn.q_proj.to("meta")
    torch.save(layers[3], path)
    refuse(old, tmp_path, str(path), "self_attn.q_proj.weight is not a plain tensor")


@pytest.mark.usefixtures("in_this_process")
def test_layers_that_contradict_themselves_or_each_other_are_refused(layers, old, donor_dir, tmp_path, monkeypatch):
    path = old / "layer_2.pt"
    layer = layers[2]
    layer.self_attn.out_proj = torch.nn.Linear(32, 32, bias=False)
    torch.save(layer, path)
    refuse(old, tmp_path, str(path), "out_proj.weight is another name for self_attn.o_proj.weight")
    layer.self_attn.out_proj = layer.self_attn.o_proj
    layer.mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    torch.save(layer, path)
    refuse(old, tmp_path, f"mlp.up_proj.weight in {path} is [48, 32]", "must be [40, 32]")
    torch.save(layers[1], path)
    refuse(old, tmp_path, str(path), "has layer_idx 1, but")
    torch.save(layers[1], old / "layer_1.pt")
    layers[3].self_attn.config = LlamaForCausalLM.config_class.from_pretrained(donor_dir, rms_norm_eps=0.5)
    torch.save(layers[3], old / "layer_3.pt")
    refuse(old, tmp_path, "layer_3.pt", "rms_norm_eps 0.5; the other files or --model_name say 0.0001", layers=[1, 3])
    refuse(old, tmp_path, "no file for layer 0", "it has 1, 2, 3", layers=[0, 1])
    torch.save(layers[1], old / "1.pth")
    refuse(old, tmp_path, "1.pth and", "both for layer 1")
    (old / "1.pth").unlink()
    turned = make_old(layers[0], monkeypatch)
    turned.self_attn.rotary_emb.inv_freq *= torch.arange(1, 9)
    torch.save(turned, old / "layer_0.pt")
    refuse(old, tmp_path, "layer_0.pt", "has other rotary frequencies", layers=[0])
    del turned.self_attn.config.num_hidden_layers  # transformers would fill in its own default
    torch.save(turned, old / "layer_0.pt")
    refuse(old, tmp_path, "layer_0.pt", "it lacks num_hidden_layers", "--model_name", layers=[0])


@pytest.mark.usefixtures("in_this_process")
def test_modules_without_config_take_the_donors_by_name(layers, old, donor_dir, layers_dir, tmp_path):
    del layers[1].self_attn.config
    torch.save(layers[1].bfloat16(), old / "layer_1.pt")
    refuse(old, tmp_path, "layer_1.pt has no config", "--model_name")
    settings = tmp_path / "settings"
    shutil.copytree(donor_dir, settings, ignore=shutil.ignore_patterns("*.safetensors"))
    metadata = import_layers.import_legacy(
        old, tmp_path / "out", trust_pickle=True, model_name=str(settings), dtype=torch.float32
    )
    assert metadata["layers"].keys() == {"1"}
    assert (metadata["total_layers"], metadata["dtype"], metadata["model_name"]) == (4, "float32", str(settings))
    assert "tokenizer/tokenizer.json" in metadata["files"]
    given, kept = (torch.load(folder / "layer_01.pt") for folder in (layers_dir, tmp_path / "out"))
    assert all(torch.equal(kept[name], given[name].bfloat16().float()) for name in given)


def test_layers_of_ours_need_no_import(layers_dir, tmp_path):
    result = run_command("extract_layers", "--from_legacy", layers_dir, "--output_dir", tmp_path / "out")
    assert_refused(result, f"{layers_dir} holds metadata.json", "need no import", "--llama_layers_dir")


def test_flags_that_need_each_other(tmp_path):
    result = run_command("extract_layers", "--model_name", "llama", "--trust_pickle", "--output_dir", tmp_path / "out")
    assert_refused(result, "belongs to --from_legacy", code=2)
    result = import_by_command(tmp_path, tmp_path / "out", "--trust_pickle")
    assert_refused(result, "has no layer files such as layer_11.pt")
    assert_refused(import_by_command(tmp_path / "none", tmp_path / "out"), "is not a folder")
