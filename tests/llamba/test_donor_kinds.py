"""For every kind of donor in the table, a graft of all its layers computes what transformers' model computes.

The variants follow from a kind's `fields`, so a new entry of the table is tested without a change here.
"""

import functools
import json

import pytest
import torch
from transformers import AutoConfig

from model_preparation.checkpoint.model_configs import read_config
from model_preparation.llamba import LlambaCache, LlambaConfig, LlambaForCausalLM
from model_preparation.llamba.cache_llamba import CACHE_NAME
from model_preparation.llamba.donor_kinds import KINDS, mask_kinds
from tests.conftest import VOCABULARY, donor_fields, old_spelling, seeded, tiny_config

WINDOW = 6  # tokens; sequences shorter and longer than this are tested
GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 259}

VARIANTS = [
    pytest.param(kind.model_type, variant, id=f"{kind.model_type}-{variant}")
    for kind in KINDS.values()
    for variant in ("plain", "biases", "windows", "wide heads, tied")
    if {"biases": "attention_bias", "windows": "sliding_window"}.get(variant, "head_dim") in kind.fields
]
ROPES = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 16,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def graft_of(donor) -> LlambaForCausalLM:
    """A Llamba in which every layer is the donor's."""
    config = donor.config
    kind = KINDS[config.model_type]
    graft = LlambaForCausalLM(
        tiny_config(
            vocab_size=VOCABULARY,
            pad_vocab_size_multiple=1,
            norm_epsilon=config.rms_norm_eps,
            tie_embeddings=config.tie_word_embeddings,
            llama_layers=list(range(config.num_hidden_layers)),
            llama_cfg=kind.settings(config),
            donor_type=kind.model_type,
        )
    )
    renamed = {
        name.replace("model.embed_tokens", "backbone.embedding")
        .replace("model.norm", "backbone.final_layernorm")
        .replace("model.", "backbone."): tensor
        for name, tensor in donor.state_dict().items()
    }
    graft.load_state_dict(renamed)
    return graft.eval()


@functools.cache
def pair(model_type: str, variant: str):
    """(the donor as transformers has it, the graft of all its layers)."""
    changes = {
        "plain": {},
        "biases": {"attention_bias": True, "mlp_bias": True},
        "windows": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
        "wide heads, tied": {"head_dim": 24, "tie_word_embeddings": True},
    }[variant]
    kind = KINDS[model_type]
    fields = donor_fields(kind, **{name: value for name, value in changes.items() if name != "mlp_bias"})
    if "mlp_bias" in kind.fields and "mlp_bias" in changes:
        fields["mlp_bias"] = True
    donor = seeded(kind.transformers_class("ForCausalLM")(kind.transformers_class("Config")(**fields)), seed=5)
    return donor, graft_of(donor)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def recomputed(model, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS)
@torch.no_grad()
def test_logits_to_the_bit_and_greedy_tokens(model_type, variant):
    donor, graft = pair(model_type, variant)
    for length in (1, WINDOW - 1, WINDOW, WINDOW + 1, 30):
        ids = tokens(2, length)
        for implementation in ("eager", "sdpa"):
            donor.set_attn_implementation(implementation)
            graft.set_attn_implementation(implementation)
            assert torch.equal(graft(ids).logits, donor(ids).logits), (length, implementation)
    ids = tokens(1, 4)
    generated = graft.generate(ids, **GREEDY)
    assert torch.equal(generated, donor.generate(ids, **GREEDY))
    assert torch.equal(generated, recomputed(graft, ids, GREEDY["max_new_tokens"]))


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS)
@torch.no_grad()
def test_padding_on_either_side_and_between(model_type, variant):
    donor, graft = pair(model_type, variant)
    lengths = [11, 3]
    rows = [tokens(1, length, seed=length)[0] for length in lengths]
    more = tokens(2, 9, seed=1)
    options = {**GREEDY, "max_new_tokens": 5}
    for side in ("left", "right"):
        ids, mask = torch.full((2, max(lengths)), 77), torch.zeros(2, max(lengths), dtype=torch.long)
        for row, (text, length) in enumerate(zip(rows, lengths, strict=True)):
            place = slice(max(lengths) - length, None) if side == "left" else slice(length)
            ids[row, place], mask[row, place] = text, 1
        logits = graft(ids, attention_mask=mask).logits
        generated = graft.generate(ids, attention_mask=mask, **options)
        cache = LlambaCache(graft.config)
        graft(ids, attention_mask=mask, **{CACHE_NAME: cache})
        whole_mask = torch.cat([mask, torch.ones_like(more)], 1)
        continued = graft(more, attention_mask=whole_mask, **{CACHE_NAME: cache}).logits
        for row, text in enumerate(rows):
            alone = donor(text[None]).logits[0]
            torch.testing.assert_close(logits[row, mask[row].bool()], alone, rtol=1e-4, atol=1e-4)
            assert torch.equal(generated[row, max(lengths) :], donor.generate(text[None], **options)[0, len(text) :])
            whole = donor(torch.cat([text, more[row]])[None]).logits[0, len(text) :]
            torch.testing.assert_close(continued[row], whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS)
@torch.no_grad()
def test_packed_documents_and_prompts_in_pieces(model_type, variant):
    donor, graft = pair(model_type, variant)
    texts = [tokens(1, length, seed=length) for length in (9, 1, 13)]
    wanted = torch.cat([donor(text).logits for text in texts], 1)
    ids = torch.cat(texts, 1)
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    torch.testing.assert_close(graft(ids, position_ids=positions).logits, wanted, rtol=1e-4, atol=1e-4)
    cache, pieces = LlambaCache(graft.config), []
    for piece, places in zip(ids.split([5, 7, 11], 1), positions.split([5, 7, 11], 1), strict=True):
        pieces.append(graft(piece, position_ids=places, **{CACHE_NAME: cache}).logits)
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=1e-4, atol=1e-4)
    options = {**GREEDY, "max_new_tokens": 5}
    assert torch.equal(graft.generate(texts[2], **options, prefill_chunk_size=4), graft.generate(texts[2], **options))


@pytest.mark.parametrize("spelling", ["as saved", "older"])
@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("model_type", KINDS)
@torch.no_grad()
def test_every_rope_in_every_spelling(model_type, rope_type, spelling, tmp_path):
    kind = KINDS[model_type]
    rope = {"rope_type": rope_type, "rope_theta": 500.0, **ROPES[rope_type]}
    kind.transformers_class("Config")(**donor_fields(kind, rope_parameters=rope)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    if spelling == "older":
        path.write_text(json.dumps(old_spelling(json.loads(path.read_text()))))
    donor = seeded(kind.transformers_class("ForCausalLM")(AutoConfig.from_pretrained(tmp_path)), seed=6)
    donor.config = read_config(tmp_path)  # as our commands read it
    graft = graft_of(donor)
    ids = tokens(1, 40)  # longer than the original length; beyond it, some ropes use other frequencies
    assert torch.equal(graft(ids).logits, donor(ids).logits)
    assert graft.backbone.rotary_emb.rope_type == rope_type


def test_a_config_says_its_kind_only_where_that_is_not_llama(tmp_path):
    for model_type in KINDS:
        config = pair(model_type, "plain")[1].config
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert written.get("donor_type") == (None if model_type == "llama" else model_type)
        assert ("donor_type" in config.to_dict()) == (model_type != "llama")
        assert AutoConfig.from_pretrained(tmp_path).llama_cfg == config.llama_cfg


def test_windows_are_of_the_layers_that_have_one():
    config = pair("qwen3", "windows")[1].config
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    assert pair("mistral", "windows")[1].config.layer_types == ["sliding_attention"] * 4
    fields = {**config.file_fields(), "llama_layers": [1, 3]}
    some = LlambaConfig(**fields)
    assert some.layer_types == ["linear_attention", "full_attention", "linear_attention", "sliding_attention"]
    assert mask_kinds(some.llama_cfg, 4) == config.layer_types


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention"] * 3}, "needs 4 entries.* It has 3 entries, with the values full_attention"),
        ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "4 entries, each full_attention or sliding"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"mlp_bias": True}, "unknown fields mlp_bias"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes, words):
    fields = pair("qwen3", "windows")[1].config.file_fields()
    with pytest.raises(Exception, match=words):
        LlambaConfig(**{**fields, "llama_cfg": {**fields["llama_cfg"], **changes}})
    with pytest.raises(Exception, match="donor_type is 'gemma2'; this version knows llama, mistral"):
        LlambaConfig(**{**fields, "donor_type": "gemma2"})
