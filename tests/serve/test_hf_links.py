"""The folder of links from which a checkpoint of format pt is served."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from model_preparation import SurgeryError
from model_preparation.checkpoint.load import load_checkpoint
from model_preparation.io.linked_files import can_reflink
from model_preparation.serve.hf_links import hf_folder


def test_transformers_opens_it_and_the_weights_are_not_copied(served_dirs, tmp_path):
    checkpoint = shutil.copytree(served_dirs["pt"], tmp_path / "graft")
    for _ in range(2):  # a second start makes it again
        folder = hf_folder(checkpoint)
        assert folder == tmp_path / "graft-hf"
    weights = folder / "pytorch_model.bin"
    assert weights.samefile(checkpoint / "model_state_dict.pt") or can_reflink(tmp_path)
    opened, ours = AutoModelForCausalLM.from_pretrained(folder), load_checkpoint(checkpoint)[0]
    prompt = torch.tensor([[1, 6, 5, 38]])
    assert torch.equal(opened(prompt).logits, ours(prompt).logits)
    assert hf_folder(served_dirs["hf"]) == served_dirs["hf"].resolve()


def test_what_cannot_be_served_is_refused(served_dirs, tmp_path):
    checkpoint = shutil.copytree(served_dirs["pt"], tmp_path / "graft")
    state_dict = torch.load(checkpoint / "model_state_dict.pt")
    torch.save({f"module.{name}": tensor for name, tensor in state_dict.items()}, checkpoint / "model_state_dict.pt")
    with pytest.raises(SurgeryError, match=r"wrapped model \(module\."):
        hf_folder(checkpoint)
    (tmp_path / "graft-hf").mkdir()
    (tmp_path / "graft-hf" / "mine.txt").write_text("mine")
    with pytest.raises(SurgeryError, match="in the way"):
        hf_folder(checkpoint)
