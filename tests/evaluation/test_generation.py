"""Text from a model: what is counted and timed, and that broken logits are an error and never a text."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.generation import generate_text

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
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=1.0,
    )
    return LlamaForCausalLM(config).eval()


def always(model, token):
    """Make `model` write `token` after whatever it reads."""
    model.lm_head = torch.nn.Linear(16, len(WORDS))
    torch.nn.init.zeros_(model.lm_head.weight)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.eye(len(WORDS))[token])
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
        model.lm_head.weight[END] = 0  # a logit of 0 is never the largest here, so that it goes on to the end
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


def test_the_tokenizers_end_token_ends_the_text_of_a_model_that_names_none(model, tokenizer):
    generation = generate_text(always(model, END), tokenizer, "the cat", max_new_tokens=5)
    assert generation.text == ""
    assert generation.new_tokens == 1


def test_the_models_own_end_token_comes_before_the_tokenizers(model, tokenizer):
    model.generation_config.eos_token_id = 3
    assert generate_text(always(model, 3), tokenizer, "the cat", max_new_tokens=5).new_tokens == 1
    assert generate_text(always(model, END), tokenizer, "the cat", max_new_tokens=5).new_tokens == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_logit_of_the_prompt_that_is_not_finite_is_an_error(model, tokenizer, value):
    with torch.no_grad():
        model.model.embed_tokens.weight[WORDS.index("mat")] = value
    with pytest.raises(SurgeryError, match=r"not finite in the prompt 'the cat mat'.*--dtype float32"):
        generate_text(model, tokenizer, "the cat mat")


def test_a_logit_that_is_not_finite_while_writing_is_an_error(model, tokenizer):
    always(model, WORDS.index("mat"))
    with torch.no_grad():
        model.model.embed_tokens.weight[WORDS.index("mat")] = float("nan")
    with pytest.raises(SurgeryError, match="not finite at new token 2 after the prompt 'the cat'"):
        generate_text(model, tokenizer, "the cat")


def test_a_prompt_without_tokens_is_an_error(model, tokenizer):
    with pytest.raises(SurgeryError, match="has no tokens"):
        generate_text(model, tokenizer, "")
