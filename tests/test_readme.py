"""Every command block of the documents runs as it stands, in a copy of the repository, on tiny models.

The published names lead to stand-ins of 32 layers through the environment variables meant for that. The two set-up
commands are left out here: CI runs scripts/run_tests.sh, and tests/embedded/ runs scripts/quickstart.sh.
"""

import ast
import itertools
import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from model_preparation.evaluation.mmlu_questions import SUBJECTS
from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import (
    HANG_SECONDS,
    PACKAGE,
    VOCABULARY,
    assert_refused,
    copy_repository,
    make_tokenizer,
    run_command,
    seeded,
    tiny_config,
)
from tests.evaluation.test_mmlu import question, write_questions

ROOT = Path(__file__).parents[1]
# Run in this order: the pages of docs/ need what README.md makes. They do not need each other.
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
DOCUMENTS = (*PAGES, "README.zh-CN.md", "docs/zh/guide.md", "SETUP.md", "CONTRIBUTING.md", "benchmarks/README.md")
SET_UP = ("bash scripts/quickstart.sh\n", "bash scripts/run_tests.sh\n")
END = 257  # of the tiny tokenizer
ENDS = [END, *range(0, 256, 4)]  # so the stand-ins' texts are short

# One interpreter for several blocks, as importing torch takes longer than they do; no block sees another's names.
RUN_EACH = "import sys\nfor code in sys.argv[1:]: exec(compile(code, code, 'exec'), {'__name__': '__main__'})"


def code_blocks(document: str) -> list[tuple[str, str]]:
    """(info string, code) of every fenced block, in order."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(r"^```(\S[^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, str]:
    """Environment variables that lead every published name to a tiny model with its number of layers."""
    folder = tmp_path_factory.mktemp("published")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        max_position_embeddings=2048,
        eos_token_id=ENDS,
    )
    llama = seeded(LlamaForCausalLM(config), seed=3, scale=0.1)
    llama.save_pretrained(folder / "llama")
    (folder / "old_layers").mkdir()
    torch.save(llama.model.layers[11], folder / "old_layers" / "layer_11.pt")
    make_tokenizer().save_pretrained(folder / "llama")
    ssm_cfg = {**tiny_config().ssm_cfg, "chunk_size": 32}  # quicker than chunks of 8
    config = tiny_config(n_layer=32, ssm_cfg=ssm_cfg, mlp_cfg={"intermediate_size": 16}, eos_token_id=ENDS)
    base = seeded(LlambaForCausalLM(config), seed=4, scale=0.1)
    with torch.no_grad():
        base.lm_head.weight[END] = 0  # never the largest logit: an empty answer would be a failure
    base.save_pretrained(folder / "llamba")
    rng = random.Random(0)
    rows = {subject: {split: [question(rng)] for split in ("dev", "test")} for subject in SUBJECTS}
    return {
        "MODEL_PREPARATION_LLAMA": str(folder / "llama"),
        "MODEL_PREPARATION_UNALIGNED_LLAMBA": str(folder / "llamba"),
        "MMLU_DATA": str(write_questions(folder / "mmlu", rows)),
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, put_python) -> Path:
    """A copy of the repository as it comes, and `python` on the PATH beside it."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_repository(folder / "repository")
    # Two of the default list: one that an earlier block builds, and one more. All six would double the time.
    combinations = folder / "repository" / "model_preparation" / "best_combinations.csv"
    lines = combinations.read_text().splitlines()
    combinations.write_text("\n".join([*lines[:2], lines[-1]]) + "\n")
    put_python(folder / "bin" / "python")
    return folder


def run_blocks(blocks: list[tuple[str, str]], checkout: Path, variables: dict[str, str]) -> None:
    """Run blocks in order from the repository's root.

    Each bash block has a shell of its own. Python blocks in a row share one interpreter.
    """
    environment = {
        **os.environ,
        **variables,
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        "PYTHON": str(checkout / "bin" / "python"),
        "PYTHONPATH": str(checkout / "repository"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    commands: list[list[str]] = []
    for info, group in itertools.groupby(blocks, key=lambda block: block[0]):
        codes = [code for _, code in group]
        if info == "python":
            commands.append([str(checkout / "bin" / "python"), "-c", RUN_EACH, *codes])
        else:
            commands += [["bash", "-euo", "pipefail", "-c", code] for code in codes]
    for command in commands:
        result = subprocess.run(
            command, cwd=checkout / "repository", env=environment, capture_output=True, text=True, timeout=HANG_SECONDS
        )
        assert result.returncode == 0, f"{command[-1]}\n{result.stdout}\n{result.stderr}"


def test_every_block_of_the_pages_runs(checkout, stand_ins):
    blocks = [block for page in PAGES for block in code_blocks(page) if block[1] not in SET_UP]
    assert {info for info, _ in blocks} == {"bash", "python", "text", "yaml"}
    blocks = [(info, code) for info, code in blocks if info in ("bash", "python")]
    assert len(set(blocks)) == len(blocks)  # a page refers to another one rather than repeat it
    run_blocks(blocks, checkout, stand_ins)
    made = {path.parent.name for path in (checkout / "repository" / "model_checkpoints").glob("*/checkpoint_info.json")}
    best = {"llamba_replaced_11_13_17_21", "llamba_replaced_11_13_17_21_v2_healed", "llamba_replaced_10_14_17_30"}
    tiny = {"tiny_10", "tiny_heads", "tiny_4_10", "tiny_4"}
    assert made == {*best, *tiny, "for_transformers", "rebuilt", "mine"}


def test_the_experiment_of_the_guide_can_be_run(tmp_path):
    [experiment] = [code for info, code in code_blocks("docs/guide.md") if info == "yaml"]
    (tmp_path / "experiment.yaml").write_text(experiment)
    result = run_command("run_experiment", "experiment.yaml", "--dry_run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    steps = ["extract", "search", "build", "evaluate base", "evaluate donor", "evaluate grafted", "compare"]
    assert re.findall(r"^\d (.+?)  +to do", result.stdout, re.MULTILINE) == steps


def test_the_stages_of_the_page_on_training_are_understood(tmp_path):
    [stages] = [code for info, code in code_blocks("docs/training.md") if info == "yaml"]
    (tmp_path / "stages.yaml").write_text(stages)
    for name in ("short.txt", "answers.jsonl"):
        (tmp_path / name).touch()
    result = run_command("heal_checkpoint", "--config", "stages.yaml", cwd=tmp_path)
    assert_refused(result, "Stage long: long.jsonl is not there")


def test_every_file_that_the_architecture_names_is_there():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    chains = re.findall(r"```text\n(.*?)```", text.partition("## Four chains")[2], re.DOTALL)
    assert len(chains) == 4
    for chain in chains:
        files = re.findall(r"^ *(\S+\.py) ", chain, re.MULTILINE)
        assert len(files) == len(chain.splitlines()) <= 8
        assert [name for name in files if not (PACKAGE / name).is_file()] == []
    for name in re.findall(r"`(\w+/[\w/]*(?:\.py)?)`", text):
        assert (ROOT / name).exists() or (PACKAGE / name).exists(), name


def test_every_block_of_the_set_up_page_runs_or_says_why_not(checkout, stand_ins):
    blocks = code_blocks("SETUP.md")
    assert {info for info, _ in blocks} == {"bash", "bash no-test"}  # the latter installs from a package index
    donor = Path(stand_ins["MODEL_PREPARATION_LLAMA"])
    places = {"/models/Llama-3.1-8B-Instruct": str(donor), "/models/old_layers": str(donor.with_name("old_layers"))}
    for place, stand_in in places.items():
        assert any(place in code for _, code in blocks)
        blocks = [(info, code.replace(place, stand_in)) for info, code in blocks if info == "bash"]
    run_blocks(blocks, checkout, {})


def test_the_set_up_commands_exist_and_are_covered():
    assert [code for _, code in code_blocks("README.md") if code in SET_UP] == list(SET_UP)
    assert "scripts/run_tests.sh" in (ROOT / ".ci" / "run").read_text()
    assert "scripts/quickstart.sh" in (ROOT / "tests" / "embedded" / "test_quickstart.py").read_text()


@pytest.mark.parametrize(("page", "chinese"), [("README.md", "README.zh-CN.md"), ("docs/guide.md", "docs/zh/guide.md")])
def test_a_chinese_page_has_the_same_code(page, chinese):
    def without_comments(document: str) -> list[tuple[str, str]]:
        return [(info, re.sub(r"^#.*\n", "", code, flags=re.MULTILINE)) for info, code in code_blocks(document)]

    assert without_comments(chinese) == without_comments(page) != []


def test_the_readme_is_short():
    for document in ("README.md", "README.zh-CN.md"):
        assert len((ROOT / document).read_text(encoding="utf-8").splitlines()) <= 200, document


def test_links_between_the_documents_lead_somewhere():
    """A link's file or folder exists. If the link names a heading, its page has this heading."""
    for document in DOCUMENTS:
        for target, heading in re.findall(
            r"\]\(([^)#:]*)(?:#([^)]+))?\)", (ROOT / document).read_text(encoding="utf-8")
        ):
            path = (ROOT / document).parent / target if target else ROOT / document
            assert path.exists(), f"{document} links to {target}"
            assert not heading or heading in anchors(path), f"{document} links to {target}#{heading}"


def anchors(page: Path) -> list[str]:
    """The names that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_messages_explained_are_messages_of_ours():
    """In SETUP.md, … stands for what differs from case to case. After ours come those of torch and Python."""
    ours = (ROOT / "SETUP.md").read_text(encoding="utf-8").partition("## When something goes wrong")[2]
    explained = re.findall(r"^\| `(.+?)` \|", ours.partition("From torch and Python")[0], re.MULTILINE)
    assert len(explained) > 10
    known = [*messages(), (ROOT / "scripts" / "environment.sh").read_text()]
    assert not [message for message in explained if not any(message.strip("… ") in text for text in known)]


def test_every_row_of_a_table_has_as_many_cells_as_its_header():
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
            header, *rows = table.splitlines()
            assert not [row for row in rows if cells_of(row) != cells_of(header)], header


def cells_of(row: str) -> int:
    """The number of cells in a table's row. A | in code, or an escaped one, does not end a cell."""
    return re.sub(r"`[^`]*`|\\\|", "", row).count("|") - 1


def messages() -> Iterator[str]:
    """Every string in the package's source, with … in the places of values."""
    for path in (ROOT / "model_preparation").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
