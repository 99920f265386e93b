"""Conversations: the forms of rows, which tokens count, packing, and what is refused."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from model_preparation import build_checkpoint, extract_layers, load_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.train.distill.self_sampling import SEQUENCES_AT_ONCE
from model_preparation.train.heal import self_conversations
from model_preparation.train.heal.self_conversations import _TemplateTokens, write_conversations
from model_preparation.train.heal.sequences import Documents, collate, hold_out, load_sequences
from model_preparation.train.heal.settings import HealSettings
from tests.conftest import assert_refused, make_tokenizer
from tests.train.cutting import outcome, run_until

GENERATION = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + GENERATION
    + "<|im_start|>assistant\n{% endif %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}" + GENERATION + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# The generation tags leave the token that ends a turn outside. Older answers lose the thought before "|", so
# a longer conversation does not begin with the text of a shorter one.
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else m.content.split('|')[-1] }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}" + GENERATION + "<|im_start|>assistant\n{% endif %}"
)
# Like Mistral's: no prompt for the answer, blanks are trimmed, the end is the tokenizer's own.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}{% else %}[{{ m.content }}]{% endif %}"
    "{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + GENERATION + "assistant:{% endif %}"
ENDED = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}" + GENERATION + "<s>assistant\n{% endif %}"
)
TALK = [
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": " hm|Zwei é \n"},
    {"role": "user", "content": "assistant, three?"},
    {"role": "assistant", "content": "so|Drei"},
]


def tokenizer_with(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    marks = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = template
    return tokenizer


def write_rows(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(data: str, tokenizer: PreTrainedTokenizerFast, block_size: int = 512, **settings) -> Documents:
    return load_sequences(data, tokenizer, HealSettings(block_size=block_size, **settings), print)


def learned(item: dict[str, torch.Tensor], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The texts that have labels, one for each run of tokens. Each label equals its token."""
    ids, counted = item["input_ids"], item["labels"] != -100
    assert torch.equal(ids[counted], item["labels"][counted])
    begins = (counted & ~torch.cat([torch.zeros(1, dtype=torch.bool), counted[:-1]])).cumsum(0)
    return [tokenizer.decode(ids[counted & (begins == run)]) for run in range(1, int(begins.max()) + 1)]


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (CHATML, [" hm|Zwei é \n<|im_end|>", "so|Drei<|im_end|>"]),
        (LLAMA_3, ["hm|Zwei é<|eot_id|>", "so|Drei<|eot_id|>"]),
        (TAGGED, ["Zwei é \n<|im_end|>", "so|Drei<|im_end|>"]),
        (BRACKETS, ["hm|Zwei é</s>", "so|Drei</s>"]),
        (PLAIN, ["  hm|Zwei é \n\n", " so|Drei\n"]),
    ],
    ids=["chatml", "llama 3", "tagged", "brackets", "plain"],
)
def test_what_counts_is_what_the_template_says_token_by_token(template, turns, tmp_path):
    tokenizer = tokenizer_with(template)
    data = write_rows(tmp_path / "a.jsonl", {"messages": TALK})
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    for loss_on, wanted in (("assistant", turns), ("completion", turns[-1:]), ("all", None)):
        item = load(data, tokenizer, loss_on=loss_on)[0]
        assert tokenizer.decode(item["input_ids"]) == text
        if wanted is None:
            assert (item["labels"] != -100).tolist() == [False] + [True] * (len(item["labels"]) - 1)
        else:
            assert learned(item, tokenizer) == wanted


def test_the_forms_of_rows_are_the_same_conversation(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    pairs = [(each["role"], each["content"]) for each in TALK]
    shared = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in pairs]
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in pairs]
    (_, first), (_, answer), (_, second), (_, last) = pairs
    before = {"history": [[first, answer]]}
    system = {"system": "Be brief"}
    rows = [
        {"messages": [{"role": "system", "content": "Be brief"}, *TALK], "source": "ignored", "tools": []},
        {"messages": parts, **system},
        {"conversations": shared, **system},
        {"conversations": [{"from": "system", "value": "Be brief"}, *shared]},
        {"query": second, "response": last, **before, **system},
        {"instruction": second, "input": "", "output": last, **before, **system},
    ]
    found = [load(write_rows(tmp_path / "a.jsonl", row), tokenizer)[0] for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**rows[2], "more": 1}]), tmp_path / "b.parquet")
    found.append(load(str(tmp_path / "b.parquet"), tokenizer)[0])
    assert all(torch.equal(each["labels"], found[0]["labels"]) for each in found)
    text = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    assert {tokenizer.decode(each["input_ids"]) for each in found} == {text}
    with_input = load(write_rows(tmp_path / "a.jsonl", {"instruction": "Add", "input": "1", "output": "2"}), tokenizer)
    assert "user\nAdd\n1<|im_end|>" in tokenizer.decode(with_input[0]["input_ids"])


USER, ANSWER = TALK[0], TALK[1]
SYSTEM = {"role": "system", "content": "Be brief"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": [ANSWER]}, r"message 1 of line 2 is a turn of the assistant at the beginning; it must be user"),
        ({"messages": [USER, USER]}, "message 2 of line 2 is a turn of the user after a turn of the user"),
        ({"messages": [USER, ANSWER, SYSTEM]}, "message 3 of line 2 is a turn of the system after"),
        ({"messages": [USER, {**ANSWER, "content": " \n"}]}, "message 2 of line 2 is an empty turn of the assistant"),
        ({"messages": [USER, {**ANSWER, "content": " "}], "system": "s"}, "message 2 of line 2 is an empty turn"),
        ({"query": "a", "response": " ", "system": "s"}, "message 2 of line 2 is an empty turn"),
        ({"messages": [USER, ANSWER], "system": {"a": 1}}, r"system of line 2 has the content \{"),
        ({"messages": [SYSTEM, USER, ANSWER], "system": "s"}, "message 1 of line 2 is a turn of the system at the"),
        ({"messages": [{**USER, "role": "bot"}]}, 'message 1 of line 2 has the role "bot"; it must be one of human'),
        ({"messages": [{**USER, "role": ["user"]}]}, r'has the role \["user"\]'),
        ({"messages": [{**USER, "content": 3}]}, "message 1 of line 2 has the content 3; a text is needed"),
        ({"messages": [{**USER, "content": [{"type": "image", "url": "x"}]}]}, "or parts of text"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, r"message 2 of line 2 has tool_calls \[\{\}\], which"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "line 2 has images"),
        ({"messages": [USER, {**ANSWER, "loss": False}]}, "message 2 of line 2 has loss false, which"),
        ({"messages": []}, r"line 2 has \[\] as messages; a list of messages is needed"),
        ({"messages": [USER, ANSWER], "query": "a", "response": "b"}, "has the fields of messages and of query, resp"),
        ({"messages": ["Hello"]}, 'message 1 of line 2 is "Hello"; role and content are needed'),
        ({"query": "a", "response": "b"}, "line 2 has query and response, but earlier rows have messages"),
        ({"text": "a"}, "line 2 is a text, but earlier rows are conversations"),
        ({"prompt": "a"}, 'line 2 has no field "text" with a string, nor the fields of a conversation: messages, or'),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(row, words, tmp_path):
    data = write_rows(tmp_path / "a.jsonl", {"messages": [USER, ANSWER]}, row)
    with pytest.raises(SurgeryError, match=rf"a\.jsonl cannot be used: .*{words}"):
        load(data, tokenizer_with(CHATML))


def test_what_the_template_does_not_give_is_said(tmp_path):
    data = write_rows(tmp_path / "a.jsonl", {"messages": TALK})
    with pytest.raises(SurgeryError, match=r"a\.jsonl holds conversations, .* no chat template .*--chat_template FILE"):
        load(data, tokenizer_with(None))
    for template, words in (
        (CHATML.replace("{% for", "{{ raise_exception('no talk.') }}{% for", 1), "no talk. Correct the row, or give"),
        (
            TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", ""),
            "it does not show where turn 1 of the assistant is",
        ),
        ("{% for m in range(10 ** 9) %}x{% endfor %}", "Range too big"),
        ("Hello", "it does not show where turn 1 of the assistant is"),
        (BRACKETS.replace("m.content | trim", "m.content | upper"), "it does not show where turn 1 of the assistant"),
        ("{% for", r"it is no Jinja template \(line 1: "),
    ):
        with pytest.raises(
            SurgeryError, match=rf"chat template cannot be used for line 1 of .*a\.jsonl: .*{words}"
        ) as e:
            load(data, tokenizer_with(template))
        assert str(e.value).count("Give") + str(e.value).count("Correct") <= 1  # one piece of advice
    only_asked = write_rows(tmp_path / "b.jsonl", {"messages": [USER]})
    with pytest.raises(
        SurgeryError, match=r"line 1 of .*b\.jsonl: the conversation has no turn of the assistant. .*--loss_on all"
    ):
        load(only_asked, tokenizer_with(CHATML))
    assert len(load(only_asked, tokenizer_with(CHATML), loss_on="all")) == 1


def test_long_conversations_are_told_dropped_or_cut(tmp_path, capsys):
    tokenizer = tokenizer_with(PLAIN)
    answers = ("a" * 90, "b" * 10, "c" * 60)
    rows = [{"query": "u", "response": answer} for answer in answers]
    rows.append({"query": "u" * 80, "response": "d"})  # cut, it has no answer
    data = write_rows(tmp_path / "a.jsonl", *rows)
    lengths = [len("user: \nassistant: \n") + len(row["query"] + row["response"]) for row in rows]
    with pytest.raises(SurgeryError, match=rf"2 of 4 .*--block_size 90; the longest, line 1 .* {lengths[0]} tokens"):
        load(data, tokenizer, 90)
    assert [len(item["labels"]) for item in load(data, tokenizer, 90, long_conversations="drop")] == lengths[1:3]
    assert "2 of 4 conversations are longer than 90 tokens: 2 left out, 0 cut." in capsys.readouterr().out
    cut = load(data, tokenizer, 90, long_conversations="cut")
    assert [len(item["labels"]) for item in cut] == [90, *lengths[1:3]]
    assert "1 left out, 1 cut." in capsys.readouterr().out
    assert learned(cut[0], tokenizer) == [" " + "a" * 71]
    with pytest.raises(SurgeryError, match="No conversation fits into --block_size 8"):
        load(data, tokenizer, 8, long_conversations="drop")


def write_many(path: Path) -> str:
    """40 conversations of very different lengths."""
    lengths = np.random.default_rng(0).integers(1, 70, 40).tolist()
    rows = [{"query": f"{number}?", "response": chr(97 + number % 26) * size} for number, size in enumerate(lengths)]
    return write_rows(path, *rows)


@pytest.fixture
def many(tmp_path) -> str:
    return write_many(tmp_path / "many.jsonl")


def documents_of(sequences: Documents) -> list[tuple[int, ...]]:
    """All documents of packed sequences, sorted; positions say where each begins."""
    found = []
    for item in (sequences[index] for index in range(len(sequences))):
        begins = (item["position_ids"] == 0).nonzero().flatten().tolist()
        assert (item["labels"][begins] == -100).all()
        found += [tuple(ids.tolist()) for ids in item["input_ids"].tensor_split(begins[1:])]
    return sorted(found)


def test_packing_keeps_every_document_whole_and_fills_the_sequences(many):
    tokenizer = tokenizer_with(PLAIN)
    packed, alone = load(many, tokenizer, 96, packing=True), load(many, tokenizer, 96)
    assert documents_of(packed) == sorted(tuple(item["input_ids"].tolist()) for item in alone)
    sizes = sorted(len(packed[index]["input_ids"]) for index in range(len(packed)))
    assert sizes[-1] <= 96
    assert sizes[0] + sizes[1] > 96  # no two fit into one sequence
    assert len(packed) < len(alone) == 40
    train, held_out = hold_out(packed, 0.1)
    assert sorted(documents_of(train) + documents_of(held_out)) == documents_of(packed)
    assert held_out.parts == 4
    assert len({load(many, tokenizer, 96, packing=is_packed).digest() for is_packed in (False, True)}) == 2


def test_packed_texts_stay_apart_and_long_ones_go_on_in_the_next_document(tmp_path):
    tokenizer = tokenizer_with(None)
    data = write_rows(tmp_path / "a.jsonl", {"text": "a" * 20}, {"text": "bc"}, {"text": "d" * 9})
    found = [tokenizer.decode(ids) for ids in documents_of(load(data, tokenizer, 10, packing=True))]
    assert sorted(found) == ["a" * 10, "a" * 10, "bc</s>", "d" * 9 + "</s>"]


def test_packed_and_padded_give_the_same_loss_and_gradients(many, checkpoint_dir):
    """In float64. The loss is over all labels of the batch, as in the trainer."""
    model, tokenizer = load_checkpoint(checkpoint_dir)
    tokenizer.chat_template = PLAIN
    found = []
    for packing in (False, True):
        sequences = load(many, tokenizer, 96, packing=packing)
        batch = collate([sequences[index] for index in range(len(sequences))])
        assert ("position_ids" in batch) == packing
        model = model.double().train()
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        found.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-7, atol=0)


@pytest.fixture(scope="module")
def talking(base_dir, donor_dir, tmp_path_factory) -> Path:
    """A checkpoint of the tiny pair. Its donor's first hidden dimension is a bias that ends turns early."""
    folder = tmp_path_factory.mktemp("talking")
    donor = LlamaForCausalLM.from_pretrained(donor_dir)
    with torch.no_grad():
        donor.model.embed_tokens.weight[:, 0] = 100
        donor.lm_head.weight[:, 0] = 0
        donor.lm_head.weight[make_tokenizer().eos_token_id, 0] = 0.8
    donor.save_pretrained(shutil.copytree(donor_dir, folder / "donor"))
    (folder / "template.jinja").write_text(ENDED)
    extract_layers(str(folder / "donor"), folder / "layers")
    build_checkpoint(str(base_dir), [1, 3], folder / "layers", folder / "tiny")
    return folder / "tiny"


# Flags of the runs on `talking`. There are 4 steps, so a run can be killed before its last step.
TALK_RUN = ("--block_size", 96, "--max_steps", 4, "--self_conversations", 12)


def test_healing_on_what_the_donor_writes_is_killed_and_ends_with_the_same_bits(talking, flags, heal, tmp_path):
    given = ["--checkpoint", talking, "--data", "self", "--chat_template", talking.parent / "template.jinja", *TALK_RUN]
    whole, out, padded = (tmp_path / name for name in ("whole", "out", "padded"))
    packed = [*given, "--packing"]
    result = heal(whole, *packed)
    assert result.returncode == 0, result.stderr
    assert "The donor writes 12 conversations" in result.stdout
    killed = run_until([*flags, *packed, "--output_dir", out], 2)
    assert killed[0] == -signal.SIGKILL, killed[1]
    assert heal(out, *packed).returncode == 0
    assert outcome(out) == outcome(whole)
    assert heal(padded, *given, "--loss_on", "completion", "--max_steps", 1, "--eval_interval", 1).returncode == 0
    (written,) = (tmp_path / "out_resume").glob("written_by_donor_*")
    assert {path.name: path.read_bytes() for path in written.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole_resume").glob("written_by_donor_*/*")
    }
    for line in (written / "00000.jsonl").read_text().splitlines():
        assert [message["role"] for message in json.loads(line)["messages"]] == ["user", "assistant"]

    # The losses before and after are those of the conversations held out, over the tokens of the answers.
    for healed, folder, when in [
        (each, *end) for each in (out, padded) for end in ((talking, "before"), (each, "after"))
    ]:
        info = json.loads((healed / "checkpoint_info.json").read_text())["healing"]
        assert info["data"]["name"] == "self"
        model, tokenizer = load_checkpoint(folder)
        assert (tokenizer.chat_template == ENDED) == (when == "after")
        tokenizer.chat_template = ENDED
        conversations = load(str(written), tokenizer, 96)
        held_out = hold_out(conversations, 0.05)[1]
        logs = [
            -model(item["input_ids"][None])
            .logits[0, :-1]
            .log_softmax(-1)[item["labels"][1:] != -100]
            .gather(1, item["labels"][item["labels"] != -100][:, None])
            for item in (held_out[index] for index in range(len(held_out)))
        ]
        assert info["scores"][when]["eval_loss"] == pytest.approx(torch.cat(logs).mean().item(), abs=1e-5)


class Scripted:
    """A sampler that draws planned tokens: in each step, the next token of every row."""

    def __init__(self, *rows: list[int]):
        self.rows = [*rows, *([0],) * (SEQUENCES_AT_ONCE - len(rows))]

    def draw(self, sequences, length, seed, advance, *, begin, steer):
        self.begin, self.taken = list(begin), []
        for step in range(length - len(begin)):
            if (taken := steer([row[min(step, len(row) - 1)] for row in self.rows])) is None:
                return
            self.taken.append(taken)


def test_the_donors_turns_are_what_is_between_the_templates_words():
    tokenizer = tokenizer_with(CHATML)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    between = ids("<|im_end|>\n<|im_start|>assistant\n")
    skipped = [0] * (len(between) - 1)  # tokens drawn where the template's words are taken instead
    rows = [
        ids("Why?<|im_end|>") + skipped + ids("So é.<|im_end|>more"),
        ids("Why?<|im_end|>") + skipped + ids("<|im_start|>user<|im_end|>"),  # a mark that ends nothing
        ids("  <|im_end|>") + skipped + ids("So.<|im_end|>"),  # nobody said anything
        ids("Why?"),  # never ends
    ]
    sampler = Scripted(*rows)
    found = _TemplateTokens(tokenizer, Path("donor")).write_batch(sampler, 90, 0)
    assert found == [[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So é."}]]
    assert tokenizer.decode(sampler.begin) == "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n"
    assert [taken[0] for taken in sampler.taken][5 : 4 + len(between)] == between[1:]


def test_a_conversation_that_is_more_tokens_when_read_again_is_left_out(donor_dir, monkeypatch, tmp_path):
    tokenizer = tokenizer_with(CHATML)
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    between = ids("<|im_end|>\n<|im_start|>assistant\n")
    rows = [
        ids("Why?<|im_end|>") + [0] * (len(between) - 1) + [*ids("So."), last, *ids("<|im_end|>")]
        for last in (ids(".")[0], ids("é")[0])
    ]  # half of a character is read again as three tokens
    monkeypatch.setattr(self_conversations, "has_tokenizer", lambda donor: False)
    monkeypatch.setattr(self_conversations, "SelfSampler", lambda *_: Scripted(*rows))
    begin = ids("<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\n")
    settings = HealSettings(block_size=len(begin + rows[0]) + 1, self_conversations=1)  # and the newline at the end
    folder = write_conversations(donor_dir, tokenizer, settings, tmp_path, "cpu")
    (found,) = (folder / "00000.jsonl").read_text().splitlines()
    assert json.loads(found)["messages"][1]["content"] == "So.."


def test_a_donor_that_cannot_write_conversations_is_named(donor_dir, checkpoint_dir, heal, tmp_path):
    def write(template: str | None, **settings) -> None:
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        write_conversations(donor_dir, tokenizer, HealSettings(block_size=32, **settings), tmp_path, "cpu")

    with pytest.raises(SurgeryError, match="tokenizer has no chat template, so the donor cannot write"):
        write(None)
    with pytest.raises(SurgeryError, match="puts nothing after a turn"):
        write("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(
        SurgeryError,
        match=r"began 64 conversations, but finished only 0 within .* 32 tokens; at least one in 16",
    ):
        write(ENDED, self_conversations=8)
    (tmp_path / "x.jinja").write_text(ENDED)
    for given in (("--loss_on", "all"), ("--long_conversations", "cut"), ("--chat_template", tmp_path / "x.jinja")):
        assert_refused(heal(tmp_path / "out", *given), f"{given[0][2:]} is given, but", "text.txt holds texts and no")
    refused = heal(tmp_path / "out", "--self_conversations", 9)
    assert_refused(refused, "self_conversations has no effect on", "give --data self")
    assert_refused(heal(tmp_path / "out", "--chat_template", tmp_path / "none"), "none cannot be read", "chat template")
