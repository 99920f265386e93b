"""Text from a model: what is counted and timed, and that broken logits are an error and never a text."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.generation import generate_text
from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import seeded, tiny_config, tiny_llama_cfg

WORDS = ["</s>", "the", "cat", "sat", "on", "a", "mat", "and", "slept", "all", "day", "long"]
END = 0


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", model_input_names=["input_ids", "attention_mask"]
    )


@pytest.fixture
def model():
    """A Llamba of 4 layers with layer 1 grafted."""
    config = tiny_config(vocab_size=len(WORDS), llama_layers=[1], llama_cfg=tiny_llama_cfg())
    model = seeded(LlambaForCausalLM(config))
    model.generation_config.update(eos_token_id=END, pad_token_id=END)
    return model


def always(model, token):
    """Make `model` write `token` after whatever it reads."""
    rows, width = model.lm_head.weight.shape
    model.lm_head = torch.nn.Linear(width, rows)
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.eye(rows)[token])
    return model


def greedy(model, ids, count):
    """Greedy continuation without a cache, one full forward pass per token."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def test_the_text_is_the_greedy_continuation_without_the_prompt(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[END] = 0  # a logit of 0 is not the largest, so it goes on to max_new_tokens
    expected = greedy(model, tokenizer("the cat sat")["input_ids"], 7)
    assert END not in expected
    assert len(set(expected)) > 1

    generation = generate_text(model, tokenizer, "the cat sat", max_new_tokens=7)

    assert generation.text == tokenizer.decode(expected)
    assert generation.prompt == "the cat sat"
    assert generation.prompt_tokens == 3
    assert generation.new_tokens == 7


def test_the_models_own_sampling_settings_are_not_used(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[END] = 0
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=0)
    texts = {generate_text(model, tokenizer, "the cat", max_new_tokens=8).text for _ in range(3)}
    assert len(texts) == 1


def test_prompt_and_new_tokens_are_timed_apart(model, tokenizer):
    generation = generate_text(always(model, 2), tokenizer, "the cat sat on", max_new_tokens=5)
    assert generation.prefill_seconds > 0
    assert generation.decode_seconds > 0
    assert generation.prefill_tokens_per_second == 4 / generation.prefill_seconds
    assert generation.decode_tokens_per_second == 4 / generation.decode_seconds  # the first is the prefill's


def test_a_single_new_token_has_no_decode_speed(model, tokenizer):
    generation = generate_text(always(model, 2), tokenizer, "the", max_new_tokens=1)
    assert generation.text == "cat"
    assert generation.decode_tokens_per_second is None


def test_the_end_token_ends_the_text_and_is_no_part_of_it(model, tokenizer):
    generation = generate_text(always(model, END), tokenizer, "the cat", max_new_tokens=5)
    assert generation.text == ""
    assert generation.new_tokens == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_of_the_prompt_that_is_not_finite_is_an_error(model, tokenizer, value):
    with torch.no_grad():
        model.get_input_embeddings().weight[WORDS.index("mat")] = value
    with pytest.raises(SurgeryError, match=r"not finite in the prompt 'the cat mat'.*--dtype float32"):
        generate_text(model, tokenizer, "the cat mat")


def test_a_logit_that_is_not_finite_while_writing_is_an_error(model, tokenizer):
    always(model, WORDS.index("mat"))
    with torch.no_grad():
        model.get_input_embeddings().weight[WORDS.index("mat")] = float("nan")
    with pytest.raises(SurgeryError, match="not finite at new token 2 after the prompt 'the cat'"):
        generate_text(model, tokenizer, "the cat")


def test_a_prompt_without_tokens_is_an_error(model, tokenizer):
    with pytest.raises(SurgeryError, match="has no tokens"):
        generate_text(model, tokenizer, "")
