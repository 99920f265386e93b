"""TRL trains our models without changes: our examples with TRL run, and TRL's packed documents do not mix."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from model_preparation import build_checkpoint
from tests.conftest import run_python
from tests.test_examples import EXAMPLES, RUN_EACH

# On a folder of --format hf, in a process that knows nothing of this package.
ON_A_FOLDER = """
import json, sys
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

options = {"max_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
options |= {"use_cpu": True, "bf16": False}
folder = sys.argv[1]
rows = Dataset.from_dict({"text": ["abc " * 3, "de", "fghij " * 5, "k lm"]})
found = {}
for name in ("packing", "padding_free"):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    more = {name: True, "max_length": 64 if name == "packing" else None, "per_device_train_batch_size": 4}
    trainer = SFTTrainer(model, SFTConfig("out", **more, **options), train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        loss = model.eval()(**batch).loss.item()
    trainer.train()
    found[name] = {"ids": batch["input_ids"].tolist(), "places": batch["position_ids"].tolist(), "loss": loss}
pairs = Dataset.from_dict({"prompt": ["a b"] * 4, "chosen": [" c"] * 4, "rejected": [" d"] * 4})
arguments = DPOConfig("out", trust_remote_code=True, model_init_kwargs={"dtype": "float32"}, **options)
trainer = DPOTrainer(folder, args=arguments, train_dataset=pairs)
found["dpo"] = trainer.train().training_loss
assert not any(name.startswith("model_preparation") for name in sys.modules)
print(json.dumps(found))
"""


def test_the_examples_with_trl_run(quick_python, tmp_path):
    names = ("extract_layers", "build_checkpoint", "trl_sft", "trl_dpo")
    paths = [str(EXAMPLES / f"{name}.py") for name in names]
    result = run_python("-c", RUN_EACH, json.dumps(paths), cwd=tmp_path, python=quick_python)
    assert result.returncode == 0, result.stderr
    sft, dpo = list(json.loads(result.stdout.splitlines()[-1]).values())[2:]
    losses = dict(re.findall(r"^([\w-]+): loss (\S+)$", sft, re.MULTILINE))
    assert losses.keys() == {"padded", "packed", "padding-free"}
    assert losses["padded"] == losses["padding-free"]
    assert re.search(r"Loss 0\.6\d+;", dpo)


def test_on_a_folder_that_carries_its_code_packed_documents_do_not_mix(base_dir, layers_dir, quick_python, tmp_path):
    build_checkpoint(str(base_dir), [1, 3], layers_dir, tmp_path / "folder", format="hf")
    options = {"python": quick_python, "HF_HOME": str(tmp_path / "cache")}
    result = run_python("-c", ON_A_FOLDER, str(tmp_path / "folder"), cwd=tmp_path, **options)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    for name in ("packing", "padding_free"):
        (ids,), (places,) = (torch.tensor(found[name][what]) for what in ("ids", "places"))
        documents = ids.tensor_split((places == 0).nonzero().flatten()[1:])
        assert len(documents) == 4
        with torch.no_grad():
            logs = [model(each[None]).logits[0, :-1].log_softmax(-1).gather(1, each[1:, None]) for each in documents]
        assert found[name]["loss"] == pytest.approx(-torch.cat(logs).mean().item(), abs=1e-5)
    assert found["dpo"] == pytest.approx(0.693, abs=0.01)
