"""The command share_checkpoint.py: what arrives at either hub, what never leaves, and what is said when it fails.

The hubs' real clients run throughout, against a local server that takes uploads as the hubs do.
"""

import hashlib
import importlib
import json
import re
import shutil
import socket
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from modelscope_hub import set_default_config

from model_preparation import SurgeryError
from model_preparation.checkpoint.load import load_checkpoint
from model_preparation.checkpoint.share import share_checkpoint
from model_preparation.hub import upload
from model_preparation.io.self_checksum import checksum_fault
from tests.checkpoint.test_sources import NOBODY, Caches, FakeHub
from tests.conftest import assert_refused, run_command
from tests.upload_hub import TOKEN, Pointer, Repository, UploadHub

REPO = "my-org/Llama-tiny"
SIDE_FILES = ["README.txt", "tensor_digests.json"]
PT_FILES = ["model.pt", "model_state_dict.pt", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
FILES = [*SIDE_FILES, *PT_FILES]
# Imported once here, rather than in every forked command.
for module in ("huggingface_hub.hf_api", "modelscope_hub.api", "model_preparation.checkpoint.share"):
    importlib.import_module(module)
TOKENS = {"modelscope": "MODELSCOPE_API_TOKEN", "huggingface": "HF_TOKEN"}


@pytest.fixture
def caches(tmp_path, monkeypatch):
    yield Caches(tmp_path, monkeypatch)
    set_default_config(None)


def serve(server):
    """Run `server` until the generator is closed."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub(caches, monkeypatch):
    """An empty hub that both clients lead to, with tokens for it."""
    for server in serve(UploadHub()):
        use(server.url, caches, monkeypatch)
        yield server


def use(url: str, caches: Caches, monkeypatch) -> None:
    for variable in TOKENS.values():
        monkeypatch.setenv(variable, TOKEN)
    caches.hubs_at(url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")


@pytest.fixture
def checkpoint(checkpoint_dir, tmp_path) -> Path:
    """A checkpoint that a test may change."""
    return shutil.copytree(checkpoint_dir, tmp_path / "tiny_1_3")


@pytest.fixture
def llama_checkpoint(checkpoint) -> Path:
    """The same, as if its base and donor were the published ones."""
    change_info(checkpoint, from_hubs)
    return checkpoint


def without_checksum(info: dict) -> dict:
    """checkpoint_info.json's fields, except its checksum of itself."""
    return {name: value for name, value in info.items() if name != "info_sha256"}


def change_info(folder: Path, change) -> dict:
    path = folder / "checkpoint_info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))
    return info


def from_hubs(info: dict) -> None:
    for key, name, hub, repo, revision in (
        ("base_model", "unaligned_llamba", "huggingface", "goombalab/Llamba-8B-untied-unaligned", "f" * 40),
        ("replacement_source", "llama", "modelscope", "LLM-Research/Meta-Llama-3.1-8B-Instruct", "master"),
    ):
        info[key].pop("path")
        info[key] |= {"name": name, "hub": hub, "id": repo, "revision": revision}


def share(checkpoint: Path, *args: object, which: str = "modelscope", repo: str = REPO, **env: str):
    env = {"HF_HUB_OFFLINE": "0", **env}
    return run_command("share_checkpoint", "--checkpoint", checkpoint, "--repo", repo, "--hub", which, *args, **env)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- What arrives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["modelscope", "huggingface", "huggingface without Xet"])
def test_every_recorded_file_arrives_and_a_second_time_nothing_is_sent(client, hub, llama_checkpoint, monkeypatch):
    which = client.split()[0]
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", "without" in client)
    (llama_checkpoint / "notes.txt").write_text("mine")
    before = contents(llama_checkpoint)
    first = share(llama_checkpoint, "--private", "--message", "four layers", which=which)
    assert first.returncode == 0, first.stderr
    assert "Not uploaded: notes.txt" in first.stdout
    place = "models/" if which == "modelscope" else ""
    assert first.stdout.splitlines()[-1] == f"Checkpoint is at {hub.url}/{place}{REPO}"
    assert contents(llama_checkpoint) == before

    repository = getattr(hub, which)[REPO]
    assert repository.private
    assert "four layers" in repository.messages[0]
    (branch,) = repository.branches.values()
    assert sorted(branch) == sorted([*FILES, "README.md", "NOTICE", "checkpoint_info.json"])
    for name in FILES:
        assert hub.holds(branch[name], before[name]), name
    assert isinstance(branch["model.pt"], Pointer)
    assert bool(hub.chunks) == (client == "huggingface")
    info = json.loads(before["checkpoint_info.json"])
    assert checksum_fault(branch["checkpoint_info.json"]) is None
    assert without_checksum(json.loads(branch["checkpoint_info.json"])) == without_checksum(info | {"format": "pt"})
    assert b"Llama 3.1 is licensed under the Llama 3.1 Community License" in branch["NOTICE"]

    card = ModelCard(branch["README.md"].decode())
    donor = {"modelscope": "LLM-Research/Meta-Llama-3.1-8B-Instruct", "huggingface": "meta-llama/Llama-3.1-8B-Instruct"}
    assert card.data.license == "llama3.1"
    assert card.data.base_model == ["goombalab/Llamba-8B-untied-unaligned", donor[which]]
    assert card.data.base_model_relation == "merge"
    assert "Built with Llama" in card.text
    if which == "modelscope":
        assert repository.licence == "llama3.1"

    sent = len(hub.sent())
    second = share(llama_checkpoint, "--private", which=which)
    assert second.returncode == 0, second.stderr
    # ModelScope's client tries to make the repository at each upload. This run uploads nothing.
    assert hub.sent()[sent:] == []
    assert share_checkpoint(llama_checkpoint, repo=REPO, hub=which, private=True) == f"{hub.url}/{place}{REPO}"
    with pytest.raises(TypeError, match="licenze"):
        share_checkpoint(llama_checkpoint, repo=REPO, hub=which, licenze="llama3.1")
    for choice in ({"hub": "githug"}, {"hub": which, "what": "githug"}):
        with pytest.raises(SurgeryError, match="'githug' cannot be chosen"):
            share_checkpoint(llama_checkpoint, repo=REPO, **choice)
    assert hub.sent()[sent:] == []
    assert len(repository.messages) == 1


@pytest.mark.parametrize("which", ["modelscope", "huggingface"])
def test_what_is_lost_or_changed_is_sent_again_and_nothing_else(which, hub, llama_checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert share(llama_checkpoint, which=which).returncode == 0
    (branch,) = getattr(hub, which)[REPO].branches.values()
    before = dict(branch)
    lost = branch.pop("model.pt")
    branch["README.md"] = b"# edited"
    del hub.blobs[lost.sha256]
    hub.calls.clear()
    assert share(llama_checkpoint, which=which).returncode == 0
    assert [call for call in hub.sent() if call.startswith("PUT")] == [f"PUT /blob/{lost.sha256}"]
    assert branch == before


@pytest.mark.parametrize("which", ["modelscope", "huggingface"])
def test_the_lines_of_the_card_load_what_was_shared(which, hub, caches, llama_checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert share(llama_checkpoint, which=which).returncode == 0
    (branch,) = getattr(hub, which)[REPO].branches.values()
    (lines,) = re.findall(r"```python\n(.*?)```", branch["README.md"].decode(), re.DOTALL)
    for server in serve(FakeHub()):
        files = {path: hub.blobs[kept.sha256] if isinstance(kept, Pointer) else kept for path, kept in branch.items()}
        getattr(server, which)[REPO] = files
        caches.hubs_at(server.url)
        names: dict = {}
        exec(compile(lines, "card", "exec"), names)
    original, _ = load_checkpoint(llama_checkpoint)
    for name, tensor in original.state_dict().items():
        assert torch.equal(names["model"].state_dict()[name], tensor)
    assert names["tokenizer"]("a")["input_ids"]


@pytest.mark.parametrize("which", ["modelscope", "huggingface"])
def test_a_branch_is_written_to_and_named_in_the_card(which, hub, llama_checkpoint):
    branches = {"modelscope": {"master": {}, "v2": {}}, "huggingface": {"main": {}}}[which]
    getattr(hub, which)[REPO] = Repository(private=False, branches=branches)
    result = share(llama_checkpoint, "--what", "recipe", "--revision", "v2", which=which)
    assert result.returncode == 0, result.stderr
    assert sorted(branches.pop("v2")) == ["NOTICE", "README.md", "README.txt", "checkpoint_info.json"]
    assert [*branches.values()] == [{}]
    if which == "modelscope":
        result = share(llama_checkpoint, "--what", "recipe", "--revision", "v3", which=which)
        assert_refused(result, "has no branch v3", "--revision")


def test_a_score_of_other_weights_is_not_shared(hub, checkpoint):
    measured = {
        "score": 0.5,
        "stderr": 0.1,
        "questions": 4,
        "lm_eval_version": "0.4.13",
        "settings": {},
        "model": {"weights": "0" * 64},
    }
    change_info(checkpoint, lambda info: info.update(mmlu_score=0.5, mmlu_result=measured))
    result = share(checkpoint, "--what", "recipe", "--licence", "apache-2.0")
    assert result.returncode == 0, result.stderr
    shared = json.loads(hub.modelscope[REPO].branches["master"]["checkpoint_info.json"])
    assert (shared["mmlu_score"], "mmlu_result" in shared) == (None, False)


def test_a_recipe_is_a_few_kilobytes_without_this_machines_paths(hub, checkpoint):
    assert str(checkpoint.parents[1]).encode() in (checkpoint / "checkpoint_info.json").read_bytes()
    result = share(checkpoint, "--what", "recipe", "--licence", "apache-2.0")
    assert result.returncode == 0, result.stderr
    branch = hub.modelscope[REPO].branches["master"]
    assert sorted(branch) == ["README.md", "README.txt", "checkpoint_info.json"]
    assert sum(map(len, branch.values())) < 10_000
    assert not any(str(checkpoint.parents[1]).encode() in content for content in branch.values())
    recorded = json.loads((checkpoint / "checkpoint_info.json").read_text())
    shared = json.loads(branch["checkpoint_info.json"])
    assert shared.keys() == recorded.keys()
    assert shared["files"] == recorded["files"]
    assert shared["base_model"]["files"] == recorded["base_model"]["files"]
    assert b"--from_info checkpoint_info.json" in branch["README.md"]


def test_one_format_of_two_leaves_the_others_files(hub, checkpoint):
    added = {"config.json": b"{}", "modeling_llamba.py": b"#", "layer.safetensors": b"s", "tokenizer.json": b"{}"}
    for name, content in added.items():
        (checkpoint / name).write_bytes(content)
    entries = {name: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for name, c in added.items()}
    assert_refused(share(checkpoint, "--what", "hf"), "has the format pt, not hf", "--format hf")
    change_info(checkpoint, lambda info: info.update(format="both", files=info["files"] | entries))
    for what, expected in (("auto", {*FILES, *added}), ("pt", {*FILES}), ("hf", {*SIDE_FILES, *added})):
        repo = f"me/{what}"
        result = share(checkpoint, "--what", what, "--licence", "mit", repo=repo)
        assert result.returncode == 0, result.stderr
        branch = hub.modelscope[repo].branches["master"]
        assert set(branch) == expected | {"README.md", "checkpoint_info.json"}
        shared = json.loads(branch["checkpoint_info.json"])
        assert shared["files"].keys() == expected
        assert shared["format"] == ("both" if what == "auto" else what)
        remote_code = f'from_pretrained("{repo}", trust_remote_code=True)' in branch["README.md"].decode()
        assert remote_code == (what != "pt")


def test_a_card_of_ones_own_is_taken_with_the_licence_in_it(hub, llama_checkpoint, tmp_path):
    card = tmp_path / "card.md"
    card.write_text("# no front matter")
    assert_refused(share(llama_checkpoint, "--card", card), "names no licence")
    card.write_text("---\nlicense: [\n---\n")
    assert_refused(share(llama_checkpoint, "--card", card), "front matter cannot be read")
    card.write_text("---\nlicense: mit\n---\n")
    assert_refused(share(llama_checkpoint, "--card", card), "under llama3.1, so this model cannot be under mit")
    card.write_text("---\nlicense: llama3.1\n---\n# Mine, ½\n")
    assert share(llama_checkpoint, "--card", card).returncode == 0
    assert hub.modelscope[REPO].branches["master"]["README.md"] == card.read_bytes()
    assert share(llama_checkpoint, "--card", card, "--licence", "mit").returncode == 2


def test_a_dry_run_shows_files_and_card_and_asks_nobody(hub, checkpoint, monkeypatch):
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    before = contents(checkpoint)
    result = share(checkpoint, "--licence", "apache-2.0", "--dry_run")
    assert result.returncode == 0, result.stderr
    sizes = {line.split()[-1]: line.split()[0] for line in result.stdout.splitlines()[:8]}
    assert sizes.keys() == {*FILES, "README.md", "checkpoint_info.json"}
    assert sizes["model.pt"] == f"{len(before['model.pt']) / 1000:.1f}"
    assert re.search(r"in 8 files, under apache-2\.0\n", result.stdout)
    assert "\n---\nlicense: apache-2.0\n" in result.stdout
    assert result.stdout.endswith(f"Nothing was uploaded to {REPO} (--dry_run).\n")
    assert (hub.calls, contents(checkpoint)) == ([], before)


# --- What never leaves ------------------------------------------------------------------------------------------------


def test_a_private_upload_into_a_public_repository_is_refused(hub, llama_checkpoint):
    hub.modelscope[REPO] = Repository(private=False, branches={"master": {}})
    hub.huggingface[REPO] = Repository(private=False, branches={"main": {}})
    for which in TOKENS:
        assert_refused(share(llama_checkpoint, "--private", which=which), "is public, so nothing was uploaded")
    assert hub.sent() == []


def test_a_changed_file_is_found_before_anything_is_made(hub, llama_checkpoint):
    path = llama_checkpoint / "model_state_dict.pt"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert_refused(share(llama_checkpoint), "model_state_dict.pt is changed (its SHA-256 differs")
    assert hub.sent() == []
    assert share(llama_checkpoint, "--no_verify").returncode == 0
    assert hub.holds(hub.modelscope[REPO].branches["master"]["model_state_dict.pt"], bytes(content))


def test_links_and_names_that_lead_out_of_the_folder_are_refused(hub, llama_checkpoint, tmp_path):
    inside = llama_checkpoint / "tokenizer" / "tokenizer.json"
    outside = shutil.move(inside, tmp_path / "tokenizer.json")
    inside.symlink_to(outside)
    assert_refused(share(llama_checkpoint), "tokenizer.json leads out of the checkpoint's folder")
    inside.unlink()
    assert_refused(share(llama_checkpoint), "tokenizer.json is missing")
    inside.write_bytes(b"{}")
    assert_refused(share(llama_checkpoint), "tokenizer.json is 2 bytes long instead of")
    shutil.copy(outside, inside)
    for name in ("../tokenizer.json", str(outside), "..\\tokenizer.json", "tokenizer/../../tokenizer.json"):
        change_info(llama_checkpoint, lambda info, name=name: info["files"].update({name: {"bytes": 1, "sha256": ""}}))
        assert_refused(share(llama_checkpoint), "leads out of the checkpoint's folder")
        change_info(llama_checkpoint, lambda info, name=name: info["files"].pop(name))
    (llama_checkpoint / "checkpoint_info.json").write_text('{"format_version": 1}')
    assert_refused(share(llama_checkpoint), "replaced_layers is missing", "Build the checkpoint again")
    (llama_checkpoint / "checkpoint_info.json").unlink()
    assert_refused(share(llama_checkpoint), "is not a complete checkpoint")
    assert hub.calls == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], ["The base tiny-llamba came from a local folder", "--licence ID"]),
        (["--licence", "Llama 3.1"], ["is not a licence id"]),
        (
            ["--licence", "llama3.1", "--repo", "me/hybrid"],
            ["begins with Llama, but hybrid does not", "me/Llama-hybrid"],
        ),
        (["--licence", "llama3", "--repo", "me/Llama-8B"], ["begins with Llama-3"]),
    ],
)
def test_a_licence_is_named_and_its_rules_kept(args, words, checkpoint):
    assert_refused(share(checkpoint, *args), *words)


def test_a_repository_needs_an_owner(checkpoint):
    for wrong in ("Llama-tiny", "a/b/c", "a/..", ""):
        assert share(checkpoint, repo=wrong).returncode == 2


# --- What goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["modelscope", "huggingface"])
def test_each_refusal_of_a_hub_is_one_clean_error(which, hub, caches, llama_checkpoint, monkeypatch):
    for existing in (False, True):
        if existing:
            repository = Repository(private=False, branches={"master": {}, "main": {}})
            getattr(hub, which)["they/Llama-x"] = repository
        result = share(llama_checkpoint, which=which, repo="they/Llama-x")
        assert_refused(result, "does not let you write to they/Llama-x", TOKENS[which])
    assert repository.messages == []
    monkeypatch.setenv(TOKENS[which], "wrong")
    caches.hubs_at(hub.url)
    hub.calls.clear()
    assert_refused(share(llama_checkpoint, which=which), "does not accept the token", TOKENS[which])
    assert hub.sent() == []
    monkeypatch.delenv(TOKENS[which])
    caches.hubs_at(hub.url)
    assert_refused(share(llama_checkpoint, which=which), f"then set {TOKENS[which]}", "login")


@pytest.mark.parametrize("which", ["modelscope", "huggingface"])
def test_a_hub_out_of_reach_is_given_up_within_seconds(which, caches, llama_checkpoint, monkeypatch):
    variable = {"modelscope": "MODELSCOPE_ENDPOINT", "huggingface": "HF_ENDPOINT"}[which]
    use(NOBODY, caches, monkeypatch)
    assert_refused(share(llama_checkpoint, which=which), f"({NOBODY}) cannot be reached", variable)
    monkeypatch.setattr(upload, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # connections succeed, and that is all
        use(f"http://127.0.0.1:{mute.getsockname()[1]}", caches, monkeypatch)
        assert_refused(share(llama_checkpoint, which=which), "cannot be reached", variable)
    if which == "huggingface":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert_refused(share(llama_checkpoint, which=which), "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("which", ["modelscope", "huggingface"])
def test_an_upload_that_breaks_off_goes_on_next_time(which, hub, llama_checkpoint, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    handler = hub.RequestHandlerClass
    take_blob, refused = handler._take_blob, []

    def refuse_once(self, digest):
        if not refused and hashlib.sha256((llama_checkpoint / "model.pt").read_bytes()).hexdigest() == digest:
            refused.append(digest)
            self._reply({"Message": "the disk is full", "error": "the disk is full"}, 400)
        else:
            take_blob(self, digest)

    monkeypatch.setattr(handler, "_take_blob", refuse_once)
    assert_refused(share(llama_checkpoint, which=which), f"The upload to {REPO} failed", "Run the command again")
    sent = len(hub.sent())
    assert share(llama_checkpoint, which=which).returncode == 0
    assert [call for call in hub.sent()[sent:] if call.startswith("PUT")] == [f"PUT /blob/{refused[0]}"]
    (branch,) = getattr(hub, which)[REPO].branches.values()
    assert hub.holds(branch["model.pt"], (llama_checkpoint / "model.pt").read_bytes())
