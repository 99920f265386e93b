"""The tokens of a distillation: text from files, text of the donor's own, a caller's tensor."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import enable_progress_bar

from model_preparation import SurgeryError
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.train.distill.self_sampling import SelfSampler, first_token
from model_preparation.train.distill.tokens import TokenData, text_files, tokens_of_text
from tests.conftest import make_tokenizer

END = "</s>"


def test_texts_follow_each_other_with_the_end_between_them(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in ("first", "née")))
    (tmp_path / "deep" / "c.txt").write_text("third" * 10)
    (tmp_path / "notes.md").write_text("not text")
    files = text_files(tmp_path)
    assert [path.name for path in files] == ["a.jsonl", "b.txt", "c.txt"]
    tokenizer, counted = make_tokenizer(), []
    tokens = tokens_of_text(files, tokenizer, 5, 1000, counted.append)
    stream = tokenizer(f"first{END}née{END}second{END}{'third' * 10}{END}")["input_ids"]
    assert tokens.tolist() == [stream[first : first + 5] for first in range(0, len(stream) - 4, 5)]
    assert sum(counted) == len(stream)
    few = tokens_of_text(files, tokenizer, 5, 12, counted.append)  # as few sequences as hold 12 tokens
    assert few.equal(tokens[:3])


def test_a_long_text_is_read_as_far_as_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr("model_preparation.train.distill.tokens._PIECE_CHARACTERS", 64)
    lines = [f"line {number} of a text\n" for number in range(40)]
    text, jsonl, endless = tmp_path / "a.txt", tmp_path / "b.jsonl", tmp_path / "c.txt"
    text.write_text("".join(lines) + "x" * 300 + " the end")
    jsonl.write_text(json.dumps({"text": text.read_text()}) + "\n")
    endless.write_bytes(text.read_bytes() * 40 + b"\xff")  # 30 tokens do not reach the bad last byte
    tokenizer = make_tokenizer()
    whole = tokenizer(text.read_text() + END)["input_ids"]
    for path in (text, jsonl):
        assert tokens_of_text([path], tokenizer, 1, 10_000, lambda count: None).flatten().tolist() == whole
    counted = []
    assert tokens_of_text([endless], tokenizer, 5, 30, counted.append).flatten().tolist() == whole[:30]
    assert sum(counted) < 128
    with pytest.raises(SurgeryError, match=r"c\.txt cannot be used"):
        tokens_of_text([endless], tokenizer, 5, 100_000, counted.append)


def test_a_text_in_pieces_begins_and_ends_once(tmp_path, monkeypatch):
    monkeypatch.setattr("model_preparation.train.distill.tokens._PIECE_CHARACTERS", 16)
    tokenizer = make_tokenizer()
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A {tokenizer.eos_token}",
        special_tokens=[(tokenizer.bos_token, begin), (tokenizer.eos_token, end)],
    )
    (tmp_path / "a.txt").write_text("word by word " * 9)
    tokens = tokens_of_text([tmp_path / "a.txt"], tokenizer, 1, 1000, lambda count: None).flatten().tolist()
    assert (tokens[0], tokens[-1]) == (begin, end)
    assert begin not in tokens[1:]
    assert end not in tokens[:-1]
    few = tokens_of_text([tmp_path / "a.txt"], tokenizer, 8, 5, lambda count: None)
    assert few.flatten().tolist() == tokens[:16]  # two sequences are needed in any case


def test_a_caller_s_tokens_are_checked():
    tokens = torch.zeros(40, 8, dtype=torch.int64)
    assert TokenData(tokens).held_out == 2
    assert TokenData(tokens[:3]).held_out == 1
    for wrong in (tokens[:1], tokens[0], tokens.int()):
        with pytest.raises(SurgeryError, match="at least two sequences"):
            TokenData(wrong)
    with pytest.raises(SurgeryError, match="one weight"):
        TokenData(tokens, torch.ones(8))
    with pytest.raises(SurgeryError, match="from 0 to 9, but the donor has only 9"):
        TokenData(tokens.index_fill(1, torch.tensor([2]), 9)).check_vocabulary(9)
    digests = {TokenData(tokens).digest(), TokenData(tokens.view(20, 16)).digest(), TokenData(tokens + 1).digest()}
    assert len(digests | {TokenData(tokens, torch.ones(40, 8)).digest()}) == 4


def test_the_donor_s_own_text_is_drawn_from_its_distribution(tmp_path, capfd):
    """A donor whose next token depends on the present one alone, in a way that is known."""
    config = LlamaConfig(
        vocab_size=4,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        intermediate_size=8,
        bos_token_id=2,
        eos_token_id=3,
    )
    model = LlamaForCausalLM(config)
    chances = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.7], [0.0, 0.5, 0.5, 0.0], [0.25] * 4])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, :4] = torch.eye(4) * 2
        # Behind the norm each token's state is sqrt(8) in its own place.
        model.lm_head.weight[:, :4] = (chances.clamp(min=1e-6).log() / 8**0.5).t()
    model.save_pretrained(tmp_path)
    advanced: list[int] = []
    enable_progress_bar()
    capfd.readouterr()
    sampler = SelfSampler(tmp_path, read_config(tmp_path), "cpu")
    assert capfd.readouterr() == ("", "")
    drawn = sampler.draw(400, 11, 0, advanced.append)
    assert drawn.shape == (400, 11)
    assert drawn.dtype == torch.int64
    assert (drawn[:, 0] == 2).all()
    assert sum(advanced) == 400 * 10
    counts = torch.zeros(4, 4)
    for before, after in zip(drawn[:, :-1].flatten(), drawn[:, 1:].flatten(), strict=True):
        counts[before, after] += 1
    torch.testing.assert_close(counts / counts.sum(1, keepdim=True), chances, atol=0.06, rtol=0)
    assert sampler.draw(400, 11, 0, advanced.append).equal(drawn)
    assert not sampler.draw(400, 11, 1, advanced.append).equal(drawn)


def test_a_donor_without_a_first_token_has_no_text_of_its_own():
    assert first_token(LlamaConfig(bos_token_id=None, eos_token_id=[7, 8])) == 7
    with pytest.raises(SurgeryError, match="--data FILE"):
        first_token(LlamaConfig(bos_token_id=None, eos_token_id=None))
