"""Every command block of the documents runs as it stands, in a copy of the repository, on tiny models.

The published names lead to stand-ins of 32 layers through the environment variables meant for that. The two set-up
commands are left out here: CI runs scripts/run_tests.sh, and tests/test_scripts.py runs scripts/quickstart.sh.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import VOCABULARY, make_tokenizer, seeded, tiny_config
from tests.evaluation.test_mmlu import rows, write_questions  # noqa: F401 (rows is a fixture)

ROOT = Path(__file__).parents[1]
SET_UP = ("bash scripts/quickstart.sh\n", "bash scripts/run_tests.sh\n")


def code_blocks(document: str) -> list[tuple[str, str]]:
    """(info string, code) of every fenced block, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```(\S[^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, rows) -> dict[str, str]:  # noqa: F811
    """Environment variables that lead every published name to a tiny model of as many layers."""
    folder = tmp_path_factory.mktemp("published")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        max_position_embeddings=2048,
    )
    seeded(LlamaForCausalLM(config), seed=3, scale=0.1).save_pretrained(folder / "llama")
    make_tokenizer().save_pretrained(folder / "llama")
    base = LlambaForCausalLM(tiny_config(n_layer=32, mlp_cfg={"intermediate_size": 16}))
    seeded(base, seed=4, scale=0.1).save_pretrained(folder / "llamba")
    return {
        "MODEL_PREPARATION_LLAMA": str(folder / "llama"),
        "MODEL_PREPARATION_UNALIGNED_LLAMBA": str(folder / "llamba"),
        "MMLU_DATA": str(write_questions(folder / "mmlu", rows)),
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files git would hand to a stranger, and `python` on the PATH beside them."""
    folder = tmp_path_factory.mktemp("checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().splitlines():
        if (ROOT / name).is_file():
            (folder / "repository" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "repository" / name)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    return folder


def run_block(info: str, code: str, checkout: Path, variables: dict[str, str]) -> subprocess.CompletedProcess:
    command = ["bash", "-euo", "pipefail", "-c", code] if info == "bash" else [sys.executable, "-c", code]
    environment = {
        **os.environ,
        **variables,
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PYTHONPATH": str(checkout / "repository"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.run(
        command, cwd=checkout / "repository", env=environment, capture_output=True, text=True, timeout=240
    )


def test_every_block_of_the_readme_runs(checkout, stand_ins):
    blocks = [(info, code) for info, code in code_blocks("README.md") if info != "text" and code not in SET_UP]
    assert {info for info, _ in blocks} == {"bash", "python"}
    assert len(blocks) == 7
    for info, code in blocks:
        result = run_block(info, code, checkout, stand_ins)
        assert result.returncode == 0, f"{code}\n{result.stdout}\n{result.stderr}"
    made = {path.parent.name for path in (checkout / "repository" / "model_checkpoints").glob("*/checkpoint_info.json")}
    assert {"llamba_replaced_11_13_17_21", "llamba_replaced_13_16_17", "mine"} <= made


def test_every_block_of_the_set_up_page_runs_or_says_why_not(checkout, stand_ins):
    blocks = code_blocks("SETUP.md")
    assert {info for info, _ in blocks} == {"bash", "bash no-test"}  # the latter installs from a package index
    for info, code in blocks:
        if info == "bash":
            code = code.replace("/models/Llama-3.1-8B-Instruct", stand_ins["MODEL_PREPARATION_LLAMA"])
            result = run_block(info, code, checkout, {})
            assert result.returncode == 0, result.stderr


def test_the_set_up_commands_exist_and_are_covered():
    assert [code for _, code in code_blocks("README.md")[:2]] == list(SET_UP)
    assert "scripts/run_tests.sh" in (ROOT / ".ci" / "run").read_text()
    assert "scripts/quickstart.sh" in (ROOT / "tests" / "test_scripts.py").read_text()


def test_the_chinese_readme_has_the_same_code():
    def without_comments(document: str) -> list[tuple[str, str]]:
        return [(info, re.sub(r"^#.*\n", "", code, flags=re.MULTILINE)) for info, code in code_blocks(document)]

    assert without_comments("README.zh-CN.md") == without_comments("README.md")


def test_links_between_the_documents_lead_somewhere():
    for document in ("README.md", "README.zh-CN.md", "SETUP.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / document).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{document} links to {target}"
