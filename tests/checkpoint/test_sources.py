"""Where models come from: names, folders and hub ids become complete local folders, or one clear error.

No test replaces the hubs' clients by others. The clients find caches with the layout that they use, or a small server
that speaks enough of both hubs' protocols. Some find a port where nobody listens, or where nobody answers.
"""

import argparse
import hashlib
import http.server
import json
import os
import socket
import subprocess
import threading
import urllib.parse
from pathlib import Path

import pytest

from model_preparation.command_line import CommandParser
from model_preparation.errors import SurgeryError
from model_preparation.hub import download
from model_preparation.hub.sources import Source, add_source_flag, has_tokenizer, resolve, tokenizer_name
from tests.conftest import HANG_SECONDS

LLAMA = "LLM-Research/Meta-Llama-3.1-8B-Instruct"
UNALIGNED = "goombalab/Llamba-8B-untied-unaligned"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOBODY = "http://127.0.0.1:9"  # the discard port: connections are refused at once

CONFIG = b'{"model_type": "llama"}'
MODEL = {"config.json": CONFIG, "model.safetensors": b"weights"}
TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{ }"}


def index(*shards: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {f"w{i}": shard for i, shard in enumerate(shards)}}).encode()


SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARDED = {"config.json": CONFIG, "model.safetensors.index.json": index(*SHARDS)} | {
    shard: shard.encode() for shard in SHARDS
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def huggingface_copy(
    cache: Path, repo: str, files: dict[str, bytes], *, kind="models", commit=COMMIT, ref="main", listed=()
) -> Path:
    """A snapshot as huggingface_hub leaves it: blobs, links, and the ref. `listed` adds the hub's list of files."""
    root = cache / f"{kind}--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name, content in files.items():
        blob = write(root / "blobs", {hashlib.sha256(content).hexdigest(): content})
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(blob / hashlib.sha256(content).hexdigest())
    write(root, {f"refs/{ref}": commit.encode()})
    if listed:
        entries = {name: {"size": 7, "blob_id": "0" * 40} for name in [*files, *listed]}
        write(root, {f"trees/{commit}.json": json.dumps({"format_version": 1, "files": entries}).encode()})
    return snapshot


def modelscope_copy(cache: Path, repo: str, files: dict[str, bytes], *, kind="models", revision="master") -> Path:
    """A snapshot as modelscope has left it since 1.38."""
    return write(cache / kind / repo.replace("/", "--") / "snapshots" / revision, files)


class Caches:
    """Both hubs' caches, empty, in a temporary folder; the hubs themselves out of reach until `hubs_at`."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        self.huggingface, self.modelscope = tmp_path / "hf" / "hub", tmp_path / "ms"
        self._monkeypatch = monkeypatch
        monkeypatch.setenv("MODELSCOPE_CACHE", str(self.modelscope))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms_home"))
        for variable in os.environ:
            if variable.startswith("MODEL_PREPARATION_") or variable.lower().endswith("_proxy"):
                monkeypatch.delenv(variable)
        for variable in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_PREFER_AI_SITE", "MODELSCOPE_DOMAIN"):
            monkeypatch.delenv(variable, raising=False)
        self.hubs_at(NOBODY)

    def hubs_at(self, url: str) -> None:
        from huggingface_hub import constants
        from modelscope_hub.config import set_default_config

        # huggingface_hub reads the environment at import, so its constants are set here.
        # See test_each_librarys_own_variables_and_no_network for the variables.
        for name, value in {
            "ENDPOINT": url,
            "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(self.huggingface),
            "HF_HUB_OFFLINE": False,
            "HF_TOKEN_PATH": str(self.huggingface / "no-token"),
        }.items():
            self._monkeypatch.setattr(constants, name, value)
        self._monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)
        set_default_config(None)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    from modelscope_hub.config import set_default_config

    yield Caches(tmp_path, monkeypatch)
    set_default_config(None)


# --- Names, overrides, spelling ---------------------------------------------------------------------------------------


def test_a_local_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    folder = write(tmp_path / "mine", MODEL)
    monkeypatch.chdir(tmp_path)
    for spelling in (str(folder), "mine", "./mine", "mine/", "../" + tmp_path.name + "/mine"):
        source = resolve(spelling)
        assert source == Source(folder, "local", "mine", None)
    assert source.as_dict() == {"hub": "local", "id": "mine", "revision": None, "path": str(folder)}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/mine").folder == folder


def test_a_hub_source_is_written_down_without_a_path(tmp_path):
    assert Source(tmp_path, "huggingface", "org/name", COMMIT).as_dict() == {
        "hub": "huggingface",
        "id": "org/name",
        "revision": COMMIT,
    }


def test_flag_beats_environment_beats_table(tmp_path, monkeypatch, caches):
    flag, variable = write(tmp_path / "flag", MODEL), write(tmp_path / "variable", MODEL)
    table = modelscope_copy(caches.modelscope, LLAMA, MODEL)
    assert resolve("llama").folder == table
    monkeypatch.setenv("MODEL_PREPARATION_LLAMA", str(variable))
    assert resolve("llama").folder == variable
    assert resolve("llama", overrides={"llama": str(flag)}).folder == flag
    assert resolve("llama", overrides={"unaligned_llamba": str(flag)}).folder == variable
    monkeypatch.setenv("MODEL_PREPARATION_LLAMA", "")
    assert resolve("llama").folder == table


@pytest.mark.parametrize(
    ("name", "repo", "variable"),
    [
        ("qwen3", "Qwen/Qwen3-8B", "QWEN3"),
        ("qwen2.5", "Qwen/Qwen2.5-7B-Instruct", "QWEN2_5"),
        ("mistral", "LLM-Research/Mistral-7B-Instruct-v0.3", "MISTRAL"),
    ],
)
def test_other_donors_have_short_names_too(name, repo, variable, tmp_path, monkeypatch, caches):
    """No shell takes a dot in the name of a variable."""
    snapshot = modelscope_copy(caches.modelscope, repo, MODEL)
    found = resolve(name)
    assert (found.folder, found.hub, found.id) == (snapshot, "modelscope", repo)
    monkeypatch.setenv(f"MODEL_PREPARATION_{variable}", str(write(tmp_path / "variable", MODEL)))
    assert resolve(name).folder == tmp_path / "variable"


def test_an_override_may_name_another_name_or_a_hub_id(caches):
    snapshot = huggingface_copy(caches.huggingface, "org/other", MODEL)
    overrides = {"llamba": "unaligned_llamba", "unaligned_llamba": "huggingface:org/other@main"}
    assert resolve("llamba", overrides=overrides) == Source(snapshot, "huggingface", "org/other", COMMIT)


def test_overrides_that_lead_round_in_a_circle_are_refused():
    with pytest.raises(SurgeryError, match=r"llamba and unaligned_llamba point to each other in a circle.*\./llamba"):
        resolve("llamba", overrides={"llamba": "unaligned_llamba", "unaligned_llamba": "llamba"})
    with pytest.raises(SurgeryError, match="but the names are"):
        resolve("llama", overrides={"lama": "x"})


def test_a_folder_given_for_llama_serves_as_the_tokenizer_too(tmp_path):
    folder = write(tmp_path / "donor", TOKENIZER)
    assert resolve("llama_tokenizer", overrides={"llama": str(folder)}).folder == folder
    other = write(tmp_path / "other", TOKENIZER)
    given = {"llama": str(folder), "llama_tokenizer": str(other)}
    assert resolve("llama_tokenizer", overrides=given).folder == other


def test_only_the_llambas_have_their_tokenizer_elsewhere():
    assert tokenizer_name("llamba") == tokenizer_name("unaligned_llamba") == "llama_tokenizer"
    assert tokenizer_name("llama") is None
    assert tokenizer_name("org/name") is None


def test_an_existing_folder_beats_a_hub_id_and_a_prefix_beats_the_folder(tmp_path, monkeypatch, caches):
    monkeypatch.chdir(tmp_path)
    snapshot = modelscope_copy(caches.modelscope, "org/name", MODEL)
    assert resolve("org/name").folder == snapshot
    folder = write(tmp_path / "org" / "name", MODEL)
    assert resolve("org/name") == Source(folder, "local", "name", None)
    assert resolve("modelscope:org/name").folder == snapshot


@pytest.mark.parametrize("name", ["./org", "../org", "~/org", "/org/name", "~nobody-here/name"])
def test_a_path_is_never_asked_of_a_hub(name, caches, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SurgeryError, match="is not there"):
        resolve(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lama",
        "a/b/c",
        "huggingface:gpt2",
        "github:a/b",
        "org/..",
        "org/name@",
        "org/name@../../x",
    ],
)
def test_what_is_neither_name_nor_folder_nor_id_is_refused(name, caches):
    with pytest.raises(SurgeryError, match="neither one of the names llama, llama_tokenizer"):
        resolve(name)


def test_a_file_is_not_a_folder(tmp_path):
    write(tmp_path, MODEL)
    with pytest.raises(SurgeryError, match=r"model\.safetensors is a file\. Give the path of a folder"):
        resolve(str(tmp_path / "model.safetensors"))


def test_the_flag_collects_overrides(capsys):
    parser = CommandParser(prog="x")
    add_source_flag(parser)
    assert parser.parse_args([]).source == {}
    arguments = parser.parse_args(["--source", "llama=/a=b", "--source", "llamba=org/name@v1"])
    assert arguments.source == {"llama": "/a=b", "llamba": "org/name@v1"}
    assert parser.parse_args([]).source == {}
    for wrong in (["llama"], ["llama="], ["lama=/x"], ["llama=/x", "--source", "llama=/y"]):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(["--source", *wrong])
    assert "llama is given more than once" in capsys.readouterr().err
    assert isinstance(parser, argparse.ArgumentParser)
    assert "huggingface:org/name@revision" in " ".join(parser.format_help().split())


# --- Complete or not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        MODEL,
        SHARDED,
        {"config.json": CONFIG, "pytorch_model.bin": b"weights"},
        {
            "config.json": CONFIG,
            "pytorch_model.bin.index.json": index("pytorch_model-1.bin"),
            "pytorch_model-1.bin": b"",
        },
        MODEL | {"pytorch_model.bin.index.json": index("pytorch_model-1.bin")},
    ],
)
def test_each_published_layout_of_weights_is_complete(files, tmp_path):
    assert resolve(str(write(tmp_path / "model", files))).hub == "local"


@pytest.mark.parametrize(
    ("files", "lacking"),
    [
        ({"README.md": b"#"}, ["config.json", "weights (model.safetensors or pytorch_model.bin"]),
        ({"config.json": CONFIG}, ["weights (model.safetensors or pytorch_model.bin"]),
        ({"model.safetensors": b""}, ["config.json"]),
        ({"config.json": CONFIG, "model.safetensors.index.json": index(*SHARDS)}, SHARDS),
        ({"config.json": CONFIG, "model.safetensors.index.json": index(*SHARDS), SHARDS[0]: b""}, SHARDS[1:]),
        ({"config.json": CONFIG, "pytorch_model.bin.index.json": index("a.bin", "b.bin"), "a.bin": b""}, ["b.bin"]),
    ],
)
def test_each_missing_file_of_a_model_is_named(files, lacking, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(SurgeryError) as error:
        resolve(str(write(tmp_path / "model", files)))
    message = str(error.value)
    assert message.startswith(f"The folder {tmp_path / 'model'} lacks {', '.join(lacking)}")
    assert not any(f" {present}," in message for present in files)


@pytest.mark.parametrize(
    ("files", "complete"),
    [
        ({"tokenizer.json": b"{}"}, True),
        ({"tokenizer.model": b""}, True),
        ({"tokenizer_config.json": b"{}", "vocab.json": b"{}"}, True),
        ({"tokenizer_config.json": b"{}"}, False),
        (MODEL, False),
    ],
)
def test_a_tokenizer_needs_its_vocabulary(files, complete, tmp_path):
    folder = str(write(tmp_path / "tokenizer", files))
    assert has_tokenizer(Path(folder)) is complete
    if complete:
        assert resolve(folder, need="tokenizer").hub == "local"
    else:
        with pytest.raises(SurgeryError, match=r"lacks a tokenizer \(tokenizer\.json"):
            resolve(folder, need="tokenizer")


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/../../x", "..\\x", "C:\\x", "C:x", "\\\\host\\x"]
)
def test_an_index_that_leads_out_of_its_folder_is_refused(shard, tmp_path):
    folder = write(tmp_path / "a" / "model", {"config.json": CONFIG, "model.safetensors.index.json": index(shard)})
    write(tmp_path / "a", {"x.safetensors": b""})
    with pytest.raises(SurgeryError, match="outside its folder"):
        resolve(str(folder))


@pytest.mark.parametrize(
    "content", [b"", b"\xff", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b'{"weight_map": {"a": 1}}']
)
def test_a_file_that_is_no_index_is_named(content, tmp_path):
    folder = write(tmp_path / "model", {"config.json": CONFIG, "model.safetensors.index.json": content})
    with pytest.raises(SurgeryError, match=r"model\.safetensors\.index\.json is not an index of weight files"):
        resolve(str(folder))


# --- No hub within reach: what is in the caches -----------------------------------------------------------------------


def test_a_modelscope_copy_serves_offline(caches, caplog):
    snapshot = modelscope_copy(caches.modelscope, LLAMA, SHARDED | TOKENIZER)
    expected = Source(snapshot, "modelscope", LLAMA, "master")
    assert resolve("llama") == resolve("llama_tokenizer") == resolve(f"{LLAMA}@master") == expected
    assert "ModelScope" in caplog.text
    assert "cannot be reached" in caplog.text
    assert str(snapshot) in caplog.text


def test_a_huggingface_copy_serves_offline_at_its_commit(caches):
    snapshot = huggingface_copy(caches.huggingface, UNALIGNED, MODEL)
    assert resolve("unaligned_llamba") == Source(snapshot, "huggingface", UNALIGNED, COMMIT)
    assert resolve(f"{UNALIGNED}@{COMMIT}").revision == COMMIT


def test_a_bare_id_prefers_the_modelscope_copy_and_a_prefix_decides(caches):
    here = modelscope_copy(caches.modelscope, "org/name", MODEL)
    there = huggingface_copy(caches.huggingface, "org/name", MODEL)
    assert resolve("org/name").folder == resolve("modelscope:org/name").folder == here
    assert resolve("huggingface:org/name").folder == there
    (here / "model.safetensors").unlink()
    assert resolve("org/name").folder == there


def test_a_revision_picks_its_own_copy(caches):
    modelscope_copy(caches.modelscope, "org/name", MODEL)
    old = modelscope_copy(caches.modelscope, "org/name", MODEL, revision="v1.0")
    nested = modelscope_copy(caches.modelscope, "org/name", MODEL, revision="try/this")
    assert resolve("modelscope:org/name@v1.0") == Source(old, "modelscope", "org/name", "v1.0")
    assert resolve("modelscope:org/name@try/this") == Source(nested, "modelscope", "org/name", "try/this")
    pull = huggingface_copy(caches.huggingface, "org/name", MODEL, ref="refs/pr/1")
    assert resolve("org/name@refs/pr/1") == Source(pull, "huggingface", "org/name", COMMIT)
    with pytest.raises(SurgeryError, match=r"^org/name@v9 is not available: ModelScope .*; Hugging Face .*\."):
        resolve("org/name@v9")


def test_copies_of_older_modelscope_versions_serve_too(caches):
    folder = write(caches.modelscope / "models" / "LLM-Research" / "Meta-Llama-3___1-8B-Instruct", MODEL)
    assert resolve("llama") == Source(folder, "modelscope", LLAMA, None)
    with pytest.raises(SurgeryError, match="does not say whether it holds v2"):
        resolve(f"modelscope:{LLAMA}@v2")


def test_a_modelscope_copy_of_nothing_but_a_config_is_incomplete(caches):
    snapshot = modelscope_copy(caches.modelscope, LLAMA, {"config.json": CONFIG})
    with pytest.raises(SurgeryError) as error:
        resolve("llama")
    message = str(error.value)
    assert f"the copy in {snapshot} lacks weights (model.safetensors" in message
    assert "Run this again when the hub answers" in message
    assert "--source llama=/path/to/folder" in message


def test_a_huggingface_copy_names_shards_lost_from_it(caches):
    snapshot = huggingface_copy(caches.huggingface, UNALIGNED, SHARDED)
    (snapshot / SHARDS[0]).unlink()
    (snapshot / SHARDS[1]).resolve().unlink()  # the blob; the link stays
    with pytest.raises(SurgeryError, match=f"lacks {SHARDS[0]}, {SHARDS[1]}"):
        resolve("unaligned_llamba")


def test_a_huggingface_copy_names_what_the_hub_listed(caches):
    huggingface_copy(
        caches.huggingface, UNALIGNED, MODEL, listed=["tokenizer.json", "README.md", "original/x.safetensors"]
    )
    with pytest.raises(SurgeryError, match=r"lacks tokenizer\.json\."):
        resolve("unaligned_llamba")


def test_a_tokenizer_copy_is_no_model(caches):
    modelscope_copy(caches.modelscope, LLAMA, TOKENIZER | {"config.json": CONFIG})
    assert resolve("llama_tokenizer").id == LLAMA
    with pytest.raises(SurgeryError, match="lacks weights"):
        resolve("llama")


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("llama", r"^LLM-Research/Meta-Llama-3\.1-8B-Instruct is not available: ModelScope "),
        ("llama_tokenizer", r"^The tokenizer of LLM-Research/Meta-Llama-3\.1-8B-Instruct is .*: ModelScope "),
        ("llamba", r"^cartesia-ai/Llamba-8B-untied is not available: Hugging Face "),
        ("unaligned_llamba", r"^goombalab/Llamba-8B-untied-unaligned is not available: Hugging Face "),
    ],
)
def test_each_name_is_looked_for_at_its_hub(name, wanted, caches):
    with pytest.raises(SurgeryError, match=wanted + rf".* --source {name}=/path/to/folder\."):
        resolve(name)


def test_no_hub_within_reach_says_what_was_looked_for_where(caches):
    with pytest.raises(SurgeryError) as error:
        resolve("org/name")
    message = str(error.value)
    assert message.startswith("org/name is not available: ModelScope (http://127.0.0.1:9) cannot be reached")
    assert f"Hugging Face ({NOBODY}) cannot be reached" in message
    assert str(caches.modelscope) in message
    assert str(caches.huggingface) in message
    assert "HF_ENDPOINT" in message
    assert message.endswith("or give a folder that holds the files: its path instead of the id.")
    assert not list(caches.modelscope.rglob("snapshots"))  # no half-made copy is left that looks whole


# The fixture `quick_python` starts processes in which huggingface_hub is already imported, with other environment
# variables. So this code imports huggingface_hub again. modelscope is not imported yet.
PROBE = """
import sys, json
assert "modelscope" not in sys.modules
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
import model_preparation.hub.sources as sources
from model_preparation.errors import SurgeryError
for name in json.loads(sys.argv[1]):
    try:
        print(json.dumps({**sources.resolve(name).as_dict()}))
    except SurgeryError as error:
        print(json.dumps(str(error)))
"""


def resolve_in_another_process(python: Path, names: list[str], home: Path, **environment: str) -> list:
    kept = {key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS", "LD_LIBRARY_PATH") if key in os.environ}
    process = subprocess.run(
        [python, "-c", PROBE, json.dumps(names)],
        env=kept | {"HOME": str(home), "PYTHONWARNINGS": "ignore"} | environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    return [json.loads(line) for line in process.stdout.splitlines() if line[:1] in '{"']


def test_each_librarys_own_variables_and_no_network(quick_python, tmp_path):
    modelscope_copy(tmp_path / "elsewhere", LLAMA, MODEL)
    huggingface_copy(tmp_path / "hf_home" / "hub", UNALIGNED, MODEL)
    kept, offline, lost = resolve_in_another_process(
        quick_python,
        ["llama", "unaligned_llamba", "org/name"],
        tmp_path,
        MODELSCOPE_CACHE=str(tmp_path / "elsewhere"),
        MODELSCOPE_ENDPOINT=NOBODY,
        HF_HOME=str(tmp_path / "hf_home"),
        HF_HUB_OFFLINE="1",
        MODEL_PREPARATION_LLAMBA="unaligned_llamba",
    )
    assert kept == {"hub": "modelscope", "id": LLAMA, "revision": "master"}
    assert offline == {"hub": "huggingface", "id": UNALIGNED, "revision": COMMIT}
    assert "HF_HUB_OFFLINE is set" in lost


# --- Hubs that answer -------------------------------------------------------------------------------------------------


class FakeHub(http.server.ThreadingHTTPServer):
    """Answers for both hubs, each with its own repositories: {id: {file: content}}; records the files it sends.

    A data set's id has `datasets/` before it.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _FakeHubHandler)
        self.modelscope: dict[str, dict[str, bytes]] = {}
        self.huggingface: dict[str, dict[str, bytes]] = {}
        self.tokens: dict[str, str] = {}  # repository -> the token that opens it
        self.sent: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class _FakeHubHandler(http.server.BaseHTTPRequestHandler):
    server: FakeHub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        parts = urllib.parse.unquote(url.path).strip("/").split("/")
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path == "/":
            self._reply(b"a hub")
        elif parts[:2] == ["api", "v1"]:
            self._modelscope(parts[2:], query)
        else:
            self._huggingface(parts[1 + (parts[1] == "models") :] if parts[0] == "api" else parts)

    def _modelscope(self, parts: list[str], query: dict[str, str]) -> None:
        repo = "/".join(parts[parts[0] == "models" : 3])
        files = self.server.modelscope.get(repo)
        if files is None or query.get("Revision") not in ("master", "v1"):
            self._reply(b'{"Code": 404, "Message": "no such thing"}', 404)
        elif not self._allowed(repo):
            self._reply(b'{"Code": 403, "Message": "private"}', 403)
        elif parts[3:] == ["repo", "files"] or (parts[0] == "datasets" and parts[3:] == ["repo", "tree"]):
            listing = [
                {"Path": name, "Type": "blob", "Size": len(content), "Sha256": hashlib.sha256(content).hexdigest()}
                for name, content in files.items()
            ]
            if parts[0] == "datasets":
                start = (int(query["PageNumber"]) - 1) * int(query["PageSize"])
                listing = listing[start : start + int(query["PageSize"])]
            self._reply(json.dumps({"Code": 200, "Success": True, "Data": {"Files": listing}}).encode())
        else:
            self._send_file(files, query["FilePath"])

    def _huggingface(self, parts: list[str]) -> None:
        repo, parts = "/".join(parts[: 2 + (parts[0] == "datasets")]), parts[parts[0] == "datasets" :]
        files = self.server.huggingface.get(repo)
        if files is None:
            self._reply(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        elif not self._allowed(repo):
            self._reply(b"{}", 403, {"X-Error-Code": "GatedRepo"})
        elif parts[2:3] == ["resolve"]:
            self._send_file(files, "/".join(parts[4:]))
        elif parts[2:3] == ["tree"]:
            self._reply(
                json.dumps(
                    [
                        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for name, content in files.items()
                    ]
                ).encode()
            )
        elif parts[2:] in ([], ["revision", "main"], ["revision", COMMIT]):
            self._reply(json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode())
        else:
            self._reply(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})

    def _allowed(self, repo: str) -> bool:
        token = self.server.tokens.get(repo)
        return token is None or self.headers.get("Authorization") == f"Bearer {token}"

    def _send_file(self, files: dict[str, bytes], name: str) -> None:
        if name not in files:
            self._reply(b"{}", 404, {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.server.sent.append(name)
        etag = hashlib.sha1(files[name]).hexdigest()
        self._reply(files[name], 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _reply(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(caches):
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    caches.hubs_at(server.url)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


UNWANTED = {
    "README.md": b"#",
    "original/consolidated.00.pth": b"again",
    "original/tokenizer.model": b"again",
    "consolidated.safetensors": b"again",
    "onnx/model.safetensors": b"again",
    "training_args.bin": b"pickle",
}
PICKLES = {"pytorch_model.bin.index.json": index("pytorch_model-1.bin"), "pytorch_model-1.bin": b"pickle"}


@pytest.mark.parametrize("which", ["modelscope", "huggingface"])
def test_only_what_is_needed_is_downloaded(which, hub):
    wanted = SHARDED | TOKENIZER | {"generation_config.json": b"{  }"}
    getattr(hub, which)["org/both"] = wanted | PICKLES | UNWANTED
    source = resolve(f"{which}:org/both", need="tokenizer")
    assert sorted(hub.sent) == sorted([*TOKENIZER, "config.json"])
    source = resolve(f"{which}:org/both")
    assert sorted(hub.sent) == sorted(wanted)  # the tokenizer not twice
    assert {path.name for path in source.folder.iterdir() if not path.name.startswith(".")} == set(wanted)
    assert (source.hub, source.id) == (which, "org/both")
    assert source.revision == ("master" if which == "modelscope" else COMMIT)


@pytest.mark.parametrize("which", ["modelscope", "huggingface"])
def test_pickles_come_only_where_there_are_no_safetensors(which, hub):
    getattr(hub, which)["org/old"] = {"config.json": CONFIG} | PICKLES | {"training_args.bin": b"pickle"}
    resolve(f"{which}:org/old")
    assert sorted(hub.sent) == sorted(["config.json", *PICKLES])


@pytest.mark.parametrize("which", ["modelscope", "huggingface"])
def test_what_was_downloaded_serves_offline_and_what_was_lost_is_fetched_again(which, hub, caches):
    getattr(hub, which)["org/name"] = SHARDED | TOKENIZER
    downloaded = resolve("org/name")
    caches.hubs_at(NOBODY)
    assert resolve("org/name") == downloaded
    assert resolve("org/name", need="tokenizer") == downloaded
    for lost in (SHARDS[0], "tokenizer.json"):
        (downloaded.folder / lost).unlink()
    with pytest.raises(SurgeryError, match=f"lacks {SHARDS[0]}"):
        resolve(f"{which}:org/name")
    caches.hubs_at(hub.url)
    assert resolve("org/name") == downloaded
    assert (downloaded.folder / SHARDS[0]).read_bytes() == SHARDS[0].encode()


def test_a_bare_id_goes_on_to_the_next_hub_where_the_first_has_not_all(hub):
    hub.modelscope["org/name"] = {"config.json": CONFIG, "README.md": b"#"}
    hub.huggingface["org/name"] = hub.huggingface["org/other"] = MODEL
    assert resolve("org/name").hub == resolve("org/other").hub == "huggingface"
    with pytest.raises(SurgeryError, match=r"ModelScope's repository, now in .*, lacks weights"):
        resolve("modelscope:org/name")


def test_a_revision_is_asked_of_the_hub(hub):
    hub.modelscope["org/name"] = hub.huggingface["org/name"] = MODEL
    assert resolve("org/name@v1").revision == "v1"
    with pytest.raises(SurgeryError, match=r"ModelScope .* has no such .*; Hugging Face .*, but not this revision"):
        resolve("org/name@v2")


@pytest.mark.parametrize("which", ["modelscope", "huggingface"])
def test_a_private_repository_opens_with_the_hubs_own_token(which, hub, caches, monkeypatch):
    getattr(hub, which)["org/private"] = MODEL
    hub.tokens["org/private"] = "secret"
    variable = {"modelscope": "MODELSCOPE_API_TOKEN", "huggingface": "HF_TOKEN"}[which]
    with pytest.raises(SurgeryError, match=rf"(denies|restricts) access \(.*{variable}\)"):
        resolve(f"{which}:org/private")
    monkeypatch.setenv(variable, "secret")
    caches.hubs_at(hub.url)
    assert resolve("org/private").hub == which


@pytest.mark.parametrize("which", ["modelscope", "huggingface"])
def test_a_download_that_breaks_off_says_so_and_goes_on_next_time(which, hub, monkeypatch):
    from modelscope_hub import _download

    monkeypatch.setattr(_download, "DOWNLOAD_RETRY_TIMES", 0)
    getattr(hub, which)["org/name"] = SHARDED
    send_file = _FakeHubHandler._send_file

    def break_off(self, files, name):
        if name == SHARDS[1] and self.command == "GET":
            self._reply(b"", 500)
        else:
            send_file(self, files, name)

    monkeypatch.setattr(_FakeHubHandler, "_send_file", break_off)
    with pytest.raises(SurgeryError, match=rf"failed \(.* lacks {SHARDS[1]}\. Run this again when the hub answers"):
        resolve(f"{which}:org/name")
    monkeypatch.setattr(_FakeHubHandler, "_send_file", send_file)
    hub.sent.clear()
    assert resolve(f"{which}:org/name").hub == which
    assert hub.sent == [SHARDS[1]]


def test_a_hub_that_never_answers_is_given_up(caches, monkeypatch):
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # connections succeed, and that is all
        caches.hubs_at(f"http://127.0.0.1:{mute.getsockname()[1]}")
        with pytest.raises(SurgeryError, match=r"ModelScope .* \(ReadTimeout\).*Hugging Face .* \(ReadTimeout"):
            resolve("org/name")


def test_a_login_page_in_place_of_the_hubs_is_no_model(hub, monkeypatch):
    monkeypatch.setattr(_FakeHubHandler, "do_GET", lambda self: self._reply(b"<html>Log in to this network</html>"))
    with pytest.raises(SurgeryError, match=r"ModelScope .*Hugging Face .* failed \(JSONDecodeError"):
        resolve("org/name")
