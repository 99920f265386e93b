"""Text from a model: what it is told, what is counted and timed, and that broken logits are an error, never a text."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.generation import generate_text, generate_texts
from model_preparation.evaluation.prompt_files import read_prompts
from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import seeded, tiny_config, tiny_llama_cfg

WORDS = ["</s>", "the", "cat", "sat", "on", "a", "mat", "and", "slept", "all", "day", "long"]
END = 0
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ 'cat' if message.role == 'user' else 'mat' }} {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}mat{% endif %}"
)


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


def test_a_prompt_and_its_new_tokens_longer_than_the_models_positions_are_an_error(model, tokenizer):
    model.config.max_position_embeddings = 6
    assert generate_text(always(model, 2), tokenizer, "the cat sat on", max_new_tokens=2).new_tokens == 2
    with pytest.raises(SurgeryError, match=r"has 4 tokens, and with 3 new ones it is longer than the 6 positions"):
        generate_text(model, tokenizer, "the cat sat on", max_new_tokens=3)


def test_every_logit_of_a_long_prompt_is_looked_at(model, tokenizer):
    words = ["the"] * 600
    words[-1] = "mat"
    generate_text(always(model, 2), tokenizer, " ".join(words), max_new_tokens=1)
    with torch.no_grad():
        model.get_input_embeddings().weight[WORDS.index("mat")] = float("nan")
    with pytest.raises(SurgeryError, match="not finite in the prompt"):
        generate_text(model, tokenizer, " ".join(words), max_new_tokens=1)


# --- Chat -------------------------------------------------------------------------------------------------------------


def test_messages_go_through_the_chat_template_and_so_do_texts_where_asked(model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[END] = 0
    tokenizer.chat_template = TEMPLATE
    messages = [
        {"role": "user", "content": "the day"},
        {"role": "assistant", "content": "slept"},
        {"role": "user", "content": "long"},
    ]
    told = {
        "cat the day mat slept cat long mat": generate_text(model, tokenizer, messages, max_new_tokens=6),
        "cat the day mat": generate_text(model, tokenizer, "the day", max_new_tokens=6, chat=True),
        "the day": generate_text(model, tokenizer, "the day", max_new_tokens=6),
    }
    for text, generation in told.items():
        ids = [WORDS.index(word) for word in text.split()]
        assert generation.prompt_tokens == len(ids)
        assert generation.new_ids == tuple(greedy(model, ids, 6))


def test_a_tokenizer_without_a_chat_template_is_an_error(model, tokenizer):
    with pytest.raises(SurgeryError, match=r"no chat template for the prompt 'the cat'.*Leave out --chat"):
        generate_text(model, tokenizer, "the cat", chat=True)


def test_messages_that_the_template_refuses_are_an_error(model, tokenizer):
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(SurgeryError, match=r"refuses the prompt 'tool: the' \(no tools here\)"):
        generate_text(model, tokenizer, [{"role": "tool", "content": "the"}])


# --- Sampling ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_one_text_and_leaves_other_random_numbers_alone(model, tokenizer):
    def draw(seed, count=1):
        drawn = {"temperature": 3.0, "seed": seed, "num_return_sequences": count}
        return generate_texts(model, tokenizer, "the cat", max_new_tokens=12, **drawn)

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = [draw(seed)[0].new_ids for seed in range(4)]
    assert torch.equal(torch.rand(3), expected)
    assert [generation.new_ids for generation in draw(0, count=4)] == first
    assert len(set(first)) > 1


def test_sampling_takes_nothing_from_the_models_own_settings(model, tokenizer):
    """Each drawn token has the probability that softmax(logits / temperature) gives it: top_k defaults to all."""
    model.generation_config.update(do_sample=True, temperature=0.01, top_k=1, top_p=0.01)
    with torch.no_grad():
        logits = model(torch.tensor([[WORDS.index("the")]])).logits[0, -1]
    draws = 200
    drawn = generate_texts(model, tokenizer, "the", max_new_tokens=1, temperature=2.0, num_return_sequences=draws)
    found = torch.bincount(torch.tensor([generation.new_ids[0] for generation in drawn]), minlength=len(WORDS)) / draws
    assert torch.allclose(found, (logits / 2.0).softmax(0), atol=0.1)
    assert (found > 0).sum() > 3


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-3}])
def test_the_narrowest_sampling_is_greedy(model, tokenizer, sampling):
    wanted = generate_text(model, tokenizer, "the cat", max_new_tokens=8).new_ids
    assert generate_text(model, tokenizer, "the cat", max_new_tokens=8, **sampling).new_ids == wanted


@pytest.mark.parametrize(("name", "value"), [("temperature", 0), ("top_p", 1.5), ("top_k", 0), ("max_new_tokens", 2.5)])
def test_a_setting_that_its_flag_refuses_is_refused(model, tokenizer, name, value):
    with pytest.raises(SurgeryError, match=f"{name} is {value}"):
        generate_text(model, tokenizer, "the cat", **{name: value})


# --- Files of prompts -------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("a.txt", "One.\r\n\n  \n Two\u2028and three. \n", ["One.", "Two\u2028and three."]),
        ("a.txt", "\ufeff你好", ["你好"]),
        (
            "a.jsonl",
            json.dumps({"prompt": "One", "id": 7}) + "\n\n" + json.dumps({"messages": MESSAGES}),
            ["One", MESSAGES],
        ),
        (
            "a.json",
            json.dumps(["One\nline", {"prompt": " Two"}, {"messages": MESSAGES}]),
            ["One\nline", " Two", MESSAGES],
        ),
    ],
)
def test_prompts_are_read_from_files(tmp_path, name, content, prompts):
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == prompts


@settings(max_examples=20)
@given(texts=st.lists(st.text(st.characters(codec="utf-8")).filter(str.strip), min_size=1))
def test_texts_survive_json_unchanged(tmp_path_factory, texts):
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "a.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert read_prompts(folder / "a.json") == read_prompts(folder / "a.jsonl") == texts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"One", "has an unknown ending"),
        ("a.txt", b" \n\n", "has no prompts"),
        ("a.txt", b"\xff\xfe", "it is UTF-16 text"),
        ("a.json", b'{"prompt": "One"}', "holds an object, not a list"),
        ("a.json", b"[]", "has no prompts"),
        ("a.json", b'["One", 2]', "Entry 2 of .*a.json is not a prompt: 2"),
        ("a.json", b"[" * 100_000, "cannot be read"),
        ("a.jsonl", b'{"prompt": "One"}\n\n{"prompt": ', "The JSON in line 3 of"),
        ("a.jsonl", b'{"text": "One"}', "Line 1 of .* is not a prompt"),
        ("a.jsonl", b'{"prompt": "One", "messages": [{"role": "user", "content": "Two"}]}', "is not a prompt"),
        ("a.jsonl", b'{"prompt": ""}', "is not a prompt"),
        ("a.jsonl", b'{"messages": []}', "is not a prompt"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', "is not a prompt"),
        ("a.jsonl", b'{"messages": [{"role": "assistant", "content": "I"}]}', "ends with an assistant message"),
    ],
)
def test_a_file_without_prompts_is_refused_with_the_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SurgeryError, match=words):
        read_prompts(tmp_path / name)


def test_a_file_of_prompts_that_is_not_there(tmp_path):
    with pytest.raises(SurgeryError, match=r"none.txt cannot be read \(No such file"):
        read_prompts(tmp_path / "none.txt")
