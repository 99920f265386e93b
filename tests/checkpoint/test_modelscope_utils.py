"""get_model_modelscope on tiny models in local folders."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import model_preparation
from model_preparation import LlambaConfig, LlambaForCausalLM, SurgeryError
from model_preparation.modelscope_utils import get_model_modelscope
from tests.conftest import HANG_SECONDS

WORDS = ["<unk>", "hello", "world", "again"]


@pytest.fixture(autouse=True)
def _no_sources_from_outside(monkeypatch):
    for variable in os.environ:
        if variable.startswith("MODEL_PREPARATION_"):
            monkeypatch.delenv(variable)


def write_tokenizer(folder: Path, words: list[str] = WORDS) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return folder


def write_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_llamba(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlambaConfig(
        vocab_size=4,
        d_model=32,
        n_layer=1,
        pad_vocab_size_multiple=8,
        mlp_cfg={"intermediate_size": 16},
        ssm_cfg={"n_v_heads": 4, "n_qk_heads": 2, "d_state": 8, "expand": 2, "chunk_size": 16},
    )
    LlambaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_llama_comes_with_its_attention_heads(tmp_path):
    folder = write_tokenizer(write_llama(tmp_path / "llama"))
    model, tokenizer, num_heads, head_dim = get_model_modelscope(str(folder))
    assert isinstance(model, LlamaForCausalLM)
    assert (num_heads, head_dim) == (4, 16)
    assert tokenizer("hello again")["input_ids"] == [1, 3]
    assert model.dtype == torch.bfloat16  # as stored
    assert not model.training
    assert get_model_modelscope(str(folder), dtype=torch.float32)[0].dtype == torch.float32
    assert get_model_modelscope(str(folder), device="meta")[0].device.type == "meta"


def test_a_named_llamba_comes_with_its_mixer_heads_and_llamas_tokenizer(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_PREPARATION_UNALIGNED_LLAMBA", str(write_llamba(tmp_path / "llamba")))
    monkeypatch.setenv("MODEL_PREPARATION_LLAMA", str(write_tokenizer(tmp_path / "llama")))
    model, tokenizer, num_heads, head_dim = get_model_modelscope("unaligned_llamba")
    assert isinstance(model, LlambaForCausalLM)
    assert (num_heads, head_dim) == (4, 16)  # together 64 wide: expand 2 x d_model 32
    inputs = tokenizer("hello world", return_tensors="pt")
    assert model(input_ids=inputs["input_ids"]).logits.shape == (1, 2, 4)


def test_a_models_own_tokenizer_comes_before_the_tokenizer_known_for_its_name(tmp_path, monkeypatch):
    own = write_tokenizer(write_llamba(tmp_path / "llamba"), WORDS[::-1])
    monkeypatch.setenv("MODEL_PREPARATION_LLAMBA", str(own))
    monkeypatch.setenv("MODEL_PREPARATION_LLAMA", str(write_tokenizer(tmp_path / "llama")))
    assert get_model_modelscope("llamba")[1]("again")["input_ids"] == [0]


def test_a_model_without_a_tokenizer_is_an_error(tmp_path):
    folder = write_llamba(tmp_path / "llamba")
    with pytest.raises(SurgeryError, match="holds no tokenizer, and none is known for"):
        get_model_modelscope(str(folder))


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ('{"model_type": "mamba2"}', "is a mamba2 model, and a donor must be llama"),
        ("{}", "model_type is missing"),
        ("[]", "config.json cannot be used"),
        ("{", "config.json cannot be used"),
    ],
)
def test_what_is_neither_llama_nor_llamba_is_an_error(config, complaint, tmp_path):
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SurgeryError, match=complaint):
        get_model_modelscope(str(tmp_path))


# As in the guide of the programs that this package replaced.
GUIDE_METHOD_2 = """
import json, torch
from modelscope_utils import get_model_modelscope
model, tokenizer, _, _ = get_model_modelscope('unaligned_llamba')
state_dict = torch.load('../weights.pt')
model.load_state_dict(state_dict)
model.eval()
print(json.dumps(sorted(state_dict) == sorted(model.state_dict())))
"""


def test_the_guides_second_way_of_loading_runs_inside_the_package_folder(tmp_path, quick_python):
    llamba = write_tokenizer(write_llamba(tmp_path / "llamba"))
    torch.save(LlambaForCausalLM.from_pretrained(llamba).state_dict(), tmp_path / "weights.pt")
    process = subprocess.run(
        [quick_python, "-c", GUIDE_METHOD_2.replace("..", str(tmp_path))],
        cwd=Path(model_preparation.__file__).parent,
        env=os.environ | {"MODEL_PREPARATION_UNALIGNED_LLAMBA": str(llamba)},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout.splitlines()[-1]) is True
