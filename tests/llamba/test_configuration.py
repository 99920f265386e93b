"""LlambaConfig: upstream's fields and Hugging Face's names, defaults, and errors that name what is wrong."""

import json

import pytest
from transformers import AutoConfig

from model_preparation.llamba import LlambaConfig
from tests.conftest import tiny_config, tiny_llama_cfg


def test_missing_fields_of_the_parts_take_the_defaults():
    config = LlambaConfig(ssm_cfg={"d_state": 16}, mlp_cfg={"bias": True})
    assert config.ssm_cfg == {
        "d_state": 16,
        "n_v_heads": 32,
        "n_qk_heads": 32,
        "d_conv": 4,
        "expand": 1,
        "chunk_size": 128,
        "activation": "identity",
        "bias": False,
        "conv_bias": True,
    }
    assert config.mlp_cfg == {"intermediate_size": 14336, "bias": True, "act_fn": "silu"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"ssm_cfg": {"d_stat": 16, "heads": 2}}, "ssm_cfg has unknown fields d_stat, heads"),
        ({"mlp_cfg": {"hidden": 16}}, "mlp_cfg has unknown fields hidden"),
        ({"ssm_cfg": [1]}, "ssm_cfg must be a dict"),
        ({"ssm_cfg": {"n_v_heads": 3}}, "n_v_heads 3 does not divide"),
        ({"ssm_cfg": {"n_v_heads": 2, "n_qk_heads": 4}}, "n_qk_heads 4 does not divide"),
        ({"ssm_cfg": {"n_v_heads": 2, "n_qk_heads": 2, "activation": "relu"}}, "'relu' is not one of"),
        ({"llama_layers": [4], "llama_cfg": tiny_llama_cfg()}, "between 0 and 3"),
        ({"llama_layers": [2, 1], "llama_cfg": tiny_llama_cfg()}, "sorted and without repeats"),
        ({"llama_layers": [1, 1], "llama_cfg": tiny_llama_cfg()}, "sorted and without repeats"),
        ({"llama_layers": [1]}, "llama_cfg lacks num_attention_heads"),
        ({"llama_layers": [1], "llama_cfg": {**tiny_llama_cfg(), "window": 3}}, "unknown fields window"),
        ({"num_attention_heads": 5}, "num_attention_heads is 5, but the other fields make it 2"),
    ],
)
def test_errors_name_the_field_and_the_value(fields, words):
    with pytest.raises(Exception, match="(?s)" + words.replace("(", r"\(")):
        tiny_config(**fields)


def test_hugging_face_names_work_both_ways():
    config = LlambaConfig(hidden_size=64, num_hidden_layers=3, tie_word_embeddings=True)
    assert (config.d_model, config.n_layer, config.tie_embeddings) == (64, 3, True)
    assert (config.hidden_size, config.num_hidden_layers, config.tie_word_embeddings) == (64, 3, True)


def test_what_other_libraries_read_is_derived_and_not_written(tmp_path):
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    pure = tiny_config()
    grafted = tiny_config(llama_layers=[1], llama_cfg=tiny_llama_cfg(), head_dim=16)
    assert [getattr(pure, name) for name in names] == [2, 2, 16, 48]
    assert [getattr(grafted, name) for name in names] == [2, 1, 16, 40]
    assert [grafted.to_dict()[name] for name in names] == [2, 1, 16, 40]  # peft reads them there
    grafted.save_pretrained(tmp_path)
    assert not set(names) & set(json.loads((tmp_path / "config.json").read_text()))
    assert not set(names) & set(grafted.file_fields())


def test_round_trip_through_a_file(tmp_path):
    config = tiny_config(llama_layers=[1, 2], llama_cfg=tiny_llama_cfg())
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, LlambaConfig)
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["ssm_cfg"]["d_state"] == 8
    assert again.layer_types == ["linear_attention", "full_attention", "full_attention", "linear_attention"]


def test_upstreams_extra_fields_are_carried():
    config = LlambaConfig(lm_head_prenorm="rms", resid_dropout=0.0)
    assert config.lm_head_prenorm == "rms"
