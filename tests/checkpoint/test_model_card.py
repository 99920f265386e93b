"""The card of a shared checkpoint, read back by the hub's own classes, and the licences it may name."""

import copy
import json
import re

import pytest
from huggingface_hub import ModelCard

from model_preparation.checkpoint.model_card import card_text
from model_preparation.errors import SurgeryError
from model_preparation.hub.licences import check_name, known_licence, licence_of, terms_of

HUB = {"hub": "huggingface", "revision": "f" * 40}
LLAMBA = {**HUB, "id": "goombalab/Llamba-8B-untied-unaligned"}
LLAMA = {"hub": "modelscope", "id": "LLM-Research/Meta-Llama-3.1-8B-Instruct", "revision": "master"}
SMOL = {**HUB, "id": "HuggingFaceTB/SmolLM2-135M"}
LOCAL = {"hub": "local", "id": "mine", "revision": None}
RESULT = {
    "score": 0.5712,
    "stderr": 0.004,
    "questions": 5700,
    "lm_eval_version": "0.4.13",
    "settings": {"task": "mmlu", "limit": 100, "num_fewshot": 5, "dtype": "bfloat16", "mmlu_data": "/home/me/mmlu"},
}


@pytest.fixture
def info(checkpoint_dir):
    """checkpoint_info.json, changed as if the checkpoint were made of the published models."""
    info = json.loads((checkpoint_dir / "checkpoint_info.json").read_text())
    info["base_model"] |= LLAMBA
    info["replacement_source"] |= LLAMA
    return info


def card(info, hub="huggingface", what="pt", licence="llama3.1", **more) -> ModelCard:
    return ModelCard(card_text(info, repo="me/Llama-x", hub=hub, what=what, licence=licence, **more))


def test_the_card_tells_the_recipe(info):
    before = copy.deepcopy(info)
    text = card(info).text
    assert info == before
    assert text.lstrip().startswith("# Llama-x\n\n**Built with Llama**\n\na tiny pair\n")
    digests = [entry["blake3"] for entry in info["base_model"]["files"].values()]
    digests += info["replacement_source"]["layers"].values()
    assert len(digests) == 4
    assert f"| base, `config.json` | BLAKE3 `{digests[0]}` |" in text
    for told in (*digests, LLAMBA["id"], LLAMA["id"], "f" * 40, "49,252", "float32", "1 3", info["creation_time"]):
        assert told in text, told
    assert f"--model_name modelscope:{LLAMA['id']}@master --layers 1 3" in text
    info["replacement_source"] |= LOCAL
    assert "--model_name /path/to/mine --layers 1 3" in card(info).text


def test_a_score_is_told_as_what_it_is(info):
    unmeasured = card(info)
    assert "MMLU was not measured." in unmeasured.text
    info["mmlu_score"] = 0.57
    given = card(info)
    assert "MMLU 0.5700: the author gave this number" in given.text
    assert "This software did not measure it" in " ".join(given.text.split())
    for other in (unmeasured, given):
        assert other.data.eval_results is None
        assert "model-index" not in other.data.to_dict()

    info["mmlu_result"] = RESULT
    measured = card(info)
    for row in (
        "| MMLU, accuracy | 0.5712 ± 0.0040 |",
        "| questions | 5,700, the first 100 of each subject |",
        "| num_fewshot | 5 |",
        "| lm-eval | 0.4.13 |",
    ):
        assert row in measured.text
    assert "/home/me" not in measured.content
    (result,) = measured.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.5712, "cais/mmlu")
    assert result.dataset_name == "MMLU (first 100 questions of each subject)"
    assert result.dataset_args == {"num_few_shot": 5}
    assert measured.data.model_name == "Llama-x"
    info["mmlu_result"] = RESULT | {"settings": RESULT["settings"] | {"limit": None}, "stderr": None}
    whole = card(info)
    assert "| MMLU, accuracy | 0.5712 |" in whole.text
    assert "| questions | 5,700 |" in whole.text
    assert whole.data.eval_results[0].dataset_name == "MMLU"


@pytest.mark.parametrize("hub", ["modelscope", "huggingface"])
@pytest.mark.parametrize("what", ["pt", "hf", "both", "recipe"])
def test_each_format_is_loaded_in_its_own_way(hub, what, info):
    made = card(info, hub=hub, what=what, revision="v2")
    lines = "\n".join(re.findall(r"```python\n(.*?)```", made.text, re.DOTALL))
    compile(lines, "card", "exec")
    client = {"modelscope": "modelscope", "huggingface": "huggingface_hub"}[hub]
    assert (f"from {client} import snapshot_download" in lines) == (what in ("pt", "both"))
    transformers = {"modelscope": "modelscope", "huggingface": "transformers"}[hub]
    assert (f"from {transformers} import AutoModelForCausalLM" in lines) == (what in ("hf", "both"))
    assert lines.count('("me/Llama-x", revision="v2"') == {"pt": 1, "hf": 2, "both": 3, "recipe": 0}[what]
    assert made.data.library_name == ("transformers" if what in ("hf", "both") else None)
    assert made.data.pipeline_tag == "text-generation"
    assert made.data.get("tasks") == (["text-generation"] if hub == "modelscope" else None)


def test_only_hub_ids_are_named_as_base_models(info):
    assert card(info).data.base_model == [LLAMBA["id"], "meta-llama/Llama-3.1-8B-Instruct"]
    assert card(info, hub="modelscope").data.base_model == [LLAMBA["id"], LLAMA["id"]]
    info["base_model"] |= LOCAL
    info["replacement_source"] |= LOCAL
    data = card(info, licence="mit").data
    assert data.base_model is None
    assert data.get("base_model_relation") is None


def test_free_text_breaks_neither_front_matter_nor_tables(info):
    info["description"] = "---\nlicense: mit\n---\n: {[ # | ½"
    info["base_model"] |= {**LOCAL, "id": "a|b\nc"}
    made = card(info)
    assert made.data.license == "llama3.1"
    assert "\n\\--- license: mit --- : {\\[ # | ½\n" in made.text
    assert "| base | `a\\|b c`, a local folder of the author |" in made.text


@pytest.mark.parametrize(
    ("repo", "licence"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
        ("meta-llama/Llama-3.1-8B", "llama3.1"),
        ("LLM-Research/Llama-3.2-1B-Instruct", "llama3.2"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama3.3"),
        ("cartesia-ai/Llamba-8B-untied", "llama3.1"),
        ("cartesia-ai/Llamba-3B", "llama3.2"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("Qwen/Qwen3-8B", "apache-2.0"),
        ("Qwen/Qwen2.5-7B-Instruct", "apache-2.0"),
        ("Qwen/Qwen2.5-3B-Instruct", None),
        ("LLM-Research/Mistral-7B-Instruct-v0.3", "apache-2.0"),
        ("someone/Llama-3.1-8B-Instruct", None),
        ("meta-llama/Llama-3.10-8B", None),
    ],
)
def test_only_published_ids_have_a_known_licence(repo, licence):
    assert known_licence({"hub": "modelscope", "id": repo}) == licence
    assert known_licence({"hub": "local", "id": repo}) is None


def pair(base: dict, donor: dict) -> dict:
    return {"base_model": base, "replacement_source": donor}


def test_the_stricter_licence_binds():
    assert licence_of(pair(LLAMBA, LLAMA)) == licence_of(pair(SMOL, LLAMA)) == "llama3.1"
    assert licence_of(pair(SMOL, SMOL)) == "apache-2.0"
    assert licence_of(pair(LOCAL, LLAMA), "Llama3.1") == "llama3.1"
    assert licence_of(pair(LOCAL, LOCAL), "cc-by-4.0") == "cc-by-4.0"
    for base, donor, given, words in (
        (LOCAL, LLAMA, None, "base mine came from a local folder"),
        (SMOL, {**HUB, "id": "a/b"}, None, "donor a/b has a licence that this program does not know"),
        (LOCAL, LLAMA, "apache-2.0", "is under llama3.1, so this model cannot be under apache-2.0"),
        (LLAMBA, {**HUB, "id": "meta-llama/Llama-3.2-1B"}, None, "base is under llama3.1, the donor is under llama3.2"),
    ):
        with pytest.raises(SurgeryError, match=words):
            licence_of(pair(base, donor), given)


def test_a_licence_that_nobody_lists_is_warned_of(caplog):
    for given in ("cc-by-4.0", "gemma", "openrail", "other", "apach-2.0"):
        assert licence_of(pair(LOCAL, LOCAL), given) == given
    assert caplog.messages == ["'apach-2.0' is not in the lists of the hubs or SPDX. If it is misspelt, correct it."]


def test_llamas_rules_hold_whatever_licence_is_named():
    terms = terms_of(pair(LOCAL, LLAMA), "other")
    assert [term.title for term in terms] == ["Llama 3.1 Community License"]
    check_name("me/Llama-3.1-hybrid", terms)
    check_name("me/llama_hybrid", terms)
    for name in ("llamba-hybrid", "hybrid-Llama"):
        with pytest.raises(SurgeryError, match=f"Give --repo me/Llama-{name}"):
            check_name(f"me/{name}", terms)
    assert terms_of(pair(SMOL, SMOL), "apache-2.0") == []
    (older,) = terms_of(pair(LOCAL, LOCAL), "llama3")
    check_name("me/Llama3-x", [older])
    with pytest.raises(SurgeryError, match="Give --repo me/Llama-3-Llama-x"):
        check_name("me/Llama-x", [older])
