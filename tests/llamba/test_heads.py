"""Grafted heads against an independent computation; no head and all heads; what the config refuses."""

import functools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from model_preparation.llamba import LlambaConfig, LlambaForCausalLM
from model_preparation.llamba.cache_bytes import cache_bytes
from model_preparation.llamba.cache_llamba import CACHE_NAME, LlambaCache
from model_preparation.llamba.donor_kinds import KINDS, picked_heads
from tests.conftest import seeded, tiny_config

LAYERS, HEADS, HEAD_DIM, WINDOW = 3, 6, 8, 5
ROPE = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16},
}
IDS = torch.randint(0, 256, (2, 21), generator=torch.Generator().manual_seed(5))


def llama_cfg(kv_heads: int, rope: str = "default", kind: str = "llama", has_window: bool = False) -> dict:
    """`has_window` gives every layer a window, but not a Qwen's first layer, and none to a Llama."""
    window = {"sliding_window": WINDOW} if has_window and "sliding_window" in KINDS[kind].fields else {}
    if window and "layer_types" in KINDS[kind].fields:
        window |= {"use_sliding_window": True, "layer_types": ["full_attention", *["sliding_attention"] * 2]}
    return {
        **window,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "head_dim": HEAD_DIM,
        "intermediate_size": 64,
        "rms_norm_eps": 1e-4,
        "max_position_embeddings": 64,
        "rope_parameters": ROPE[rope],
    }


def llamba_config(**changes) -> LlambaConfig:
    ssm = {"d_state": 8, "n_v_heads": 6, "n_qk_heads": 6, "chunk_size": 8}
    return tiny_config(d_model=48, n_layer=LAYERS, ssm_cfg=ssm, mlp_cfg={"intermediate_size": 64}, **changes)


@functools.cache
def donor_with(*of_cfg) -> PreTrainedModel:
    return donor_of(llama_cfg(*of_cfg), of_cfg[2])


def donor_of(cfg: dict, kind: str = "llama") -> PreTrainedModel:
    of_kind, window = KINDS[kind].transformers_class, {"sliding_window": None} if kind == "mistral" else {}
    sizes = {"vocab_size": llamba_config().vocab_size, "hidden_size": 48, "num_hidden_layers": LAYERS}
    return seeded(of_kind("ForCausalLM")(of_kind("Config")(**sizes, **window | cfg)), seed=31).double()


BASE = seeded(LlambaForCausalLM(llamba_config()), seed=32).double()


def graft(donor: PreTrainedModel, cfg: dict, heads: dict[int, list[int]], layers=(), **fields) -> LlambaForCausalLM:
    named = {str(layer): of_layer for layer, of_layer in heads.items()}
    kind = KINDS[donor.config.model_type]
    if heads or layers:
        fields |= {"llama_cfg": cfg, "donor_type": kind.model_type}
    config = llamba_config(llama_heads=named, llama_layers=list(layers), **fields)
    model = LlambaForCausalLM(config).double().eval()
    state = dict(BASE.state_dict())
    for layer, of_layer in heads.items():
        theirs = donor.model.layers[layer].state_dict()
        for name, picked in picked_heads(of_layer, HEADS, cfg["num_key_value_heads"], HEAD_DIM, kind).items():
            whole = theirs[name] if picked is None else theirs[f"self_attn.{name}"]
            part = whole if picked is None else whole.index_select(picked[0], torch.tensor(picked[1]))
            state[f"backbone.layers.{layer}.attention.{name}"] = part
    for layer in layers:
        prefix = f"backbone.layers.{layer}."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        state |= {prefix + name: tensor for name, tensor in donor.model.layers[layer].state_dict().items()}
    model.load_state_dict(state)
    return model


def columns(heads: list[int], size: int) -> list[int]:
    return [head * size + offset for head in heads for offset in range(size)]


@torch.no_grad()
def by_definition(donor: PreTrainedModel, heads: dict[int, list[int]], keep_mixer_heads: bool) -> Tensor:
    """Logits in float64: the base's whole mixer and transformers' whole attention, both with columns set to zero."""
    hidden = BASE.backbone.embedding(IDS)
    positions = torch.arange(IDS.shape[1])[None]
    nothing = torch.full((IDS.shape[1],) * 2, float("-inf"), dtype=hidden.dtype)
    windows = ["sliding" if getattr(donor.config, "sliding_window", None) else "full"] * LAYERS  # as a Mistral's
    windows = getattr(donor.config, "layer_types", windows)
    rotation = donor.model.rotary_emb(hidden, positions)
    for index, (ours, theirs) in enumerate(zip(BASE.backbone.layers, donor.model.layers, strict=True)):
        chosen = heads.get(index, [])
        out_proj = ours.mixer.out_proj.weight
        whole = out_proj.clone()
        if not keep_mixer_heads:
            out_proj[:, columns(chosen, 48 // HEADS)] = 0
        mixed = ours.mixer(ours.input_layernorm(hidden))
        out_proj.copy_(whole)
        if chosen:
            o_proj = theirs.self_attn.o_proj.weight
            kept = o_proj.clone()
            o_proj[:, columns([head for head in range(HEADS) if head not in chosen], HEAD_DIM)] = 0
            mask = nothing.triu(1)
            if "sliding" in windows[index]:
                mask = mask + nothing.tril(-WINDOW)
            mixed = mixed + theirs.self_attn(theirs.input_layernorm(hidden), rotation, mask[None, None])[0]
            o_proj.copy_(kept)
        hidden = hidden + mixed
        hidden = hidden + ours.mlp(ours.post_attention_layernorm(hidden))
    return BASE.lm_head(BASE.backbone.final_layernorm(hidden))[..., : BASE.config.vocab_size]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
@torch.no_grad()
def test_the_definition(kind, data):
    """Any heads of any layers, where one, two, three or six query heads share a key/value head."""
    kv_heads = data.draw(st.sampled_from([1, 2, 3, 6]))
    of_cfg = kv_heads, data.draw(st.sampled_from(sorted(ROPE))), kind, data.draw(st.booleans())
    cfg, donor = llama_cfg(*of_cfg), donor_with(*of_cfg)
    drawn = data.draw(st.dictionaries(st.integers(0, LAYERS - 1), st.sets(st.integers(0, HEADS - 1), min_size=1)))
    heads = {layer: sorted(of_layer) for layer, of_layer in drawn.items()}
    keep = data.draw(st.booleans())
    model = graft(donor, cfg, heads, keep_mixer_heads=keep)
    torch.testing.assert_close(model(IDS).logits, by_definition(donor, heads, keep), rtol=1e-6, atol=1e-6)
    cache = model(IDS, use_cache=True, return_dict=True)
    kept = next(value for name, value in cache.items() if name in ("cache", "past_key_values"))
    for layer, of_layer in heads.items():
        groups = {head // (HEADS // kv_heads) for head in of_layer}
        assert kept.layers[layer].keys.shape == kept.layers[layer].values.shape == (2, len(groups), 21, HEAD_DIM)
    held = [each.conv_states[0].nbytes + each.recurrent_states[0].nbytes for each in kept.layers]
    held += [kept.layers[layer].keys.nbytes + kept.layers[layer].values.nbytes for layer in heads]
    assert sum(held) == 2 * cache_bytes(model.config, 0, 21, torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_head_is_the_base_and_all_heads_are_the_layer(kind):
    """Both to the bit. For all heads, the base needs the donor's norms and MLP, as an unaligned base has."""
    cfg = llama_cfg(2, "default", kind, True) | {"rms_norm_eps": 1e-5}
    donor = donor_of(cfg, kind)
    assert torch.equal(graft(donor, cfg, {})(IDS).logits, BASE(IDS).logits)
    unaligned, theirs = graft(donor, cfg, {1: list(range(HEADS))}), donor.model.layers[1]
    for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
        getattr(unaligned.backbone.layers[1], name).load_state_dict(getattr(theirs, name).state_dict())
    assert torch.equal(unaligned(IDS).logits, graft(donor, cfg, {}, layers=[1])(IDS).logits)


@torch.no_grad()
def test_layers_and_heads_in_one_model():
    """Before the grafted layer, the states are those of the heads alone; after it, they differ."""
    cfg = llama_cfg(3)
    donor = donor_of(cfg)
    mixed, heads_only = graft(donor, cfg, {0: [1, 2], 2: [4]}, layers=[1]), graft(donor, cfg, {0: [1, 2], 2: [4]})
    whole = graft(donor, cfg, {}, layers=[1])
    states = {
        name: model(IDS, output_hidden_states=True).hidden_states
        for name, model in {"mixed": mixed, "heads": heads_only, "layer": whole}.items()
    }
    assert torch.equal(states["mixed"][1], states["heads"][1])
    assert not torch.equal(states["mixed"][2], states["heads"][2])
    assert not torch.equal(states["mixed"][1], states["layer"][1])
    assert mixed.config.layer_types == ["hybrid", "full_attention", "hybrid"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_heads_with_a_window_padded_packed_and_in_pieces(kind):
    """Layer 0 of a Qwen has no window. Layer 1 is a whole grafted layer, between layers with heads."""
    donor, cfg = donor_with(3, "default", kind, True), llama_cfg(3, "default", kind, True)
    model = graft(donor, cfg, {0: [1, 2, 5], 2: [0]}, layers=[1])
    whole = torch.cat([model(IDS[:1, :9]).logits, model(IDS[1:, :12]).logits], 1)
    packed, places = torch.cat([IDS[:1, :9], IDS[1:, :12]], 1), torch.cat([torch.arange(9), torch.arange(12)])[None]
    torch.testing.assert_close(model(packed, position_ids=places).logits, whole)
    mask = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, :9]], 1)
    rows, cache = torch.cat([padded, IDS[1:, :12]]), LlambaCache(model.config)
    pieces = [
        model(rows[:, start : start + 4], attention_mask=mask[:, : start + 4], **{CACHE_NAME: cache}).logits
        for start in (0, 4, 8)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()][None], whole)


def test_a_head_graft_saves_and_loads_and_other_files_have_no_new_field(tmp_path):
    cfg = llama_cfg(2)
    model = graft(donor_of(cfg), cfg, {1: [0, 4]}, keep_mixer_heads=True).float()
    model.save_pretrained(tmp_path)
    again = LlambaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert again.config.llama_heads == {"1": [0, 4]}
    assert again.config.keep_mixer_heads
    assert not {"llama_heads", "keep_mixer_heads"} & BASE.config.file_fields().keys()


@pytest.mark.parametrize(("heads", "kv_place"), [([0, 4], []), ([0, 1, 3, 4], []), ([0, 1, 4], [0, 0, 1])])
def test_a_pickled_model_of_version_0_4_still_runs(heads, kv_place):
    """It stored `kv_place`, and copied keys and values if the groups had unequal numbers of heads."""
    cfg = llama_cfg(2)
    model = graft(donor_of(cfg), cfg, {1: heads})
    wanted = model(IDS).logits
    attention = model.backbone.layers[1].attention
    for name in ("query_place", "out_place", "sliding_window"):
        delattr(attention, name)
    attention.kv_place = kv_place
    attention.num_key_value_groups = 1 if kv_place else len(heads) // 2
    again = pickle.loads(pickle.dumps(model))  # noqa: S301
    torch.testing.assert_close(again(IDS).logits, wanted)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"llama_heads": {"3": [0]}}, "'3' is not the number of a Mamba block"),
        ({"llama_heads": {"one": [0]}}, "'one' is not the number of a Mamba block"),
        ({"llama_heads": {"1": [0]}, "llama_layers": [1]}, "'1' is not the number of a Mamba block"),
        ({"llama_heads": {"1": [6]}}, "below 6"),
        ({"llama_heads": {"1": [2, 1]}}, "must be sorted"),
        ({"llama_heads": {"1": []}}, "must be sorted"),
        ({"llama_heads": [1]}, "must be like"),
        ({"llama_heads": {"1": [0]}, "llama_cfg": None}, "llama_cfg lacks"),
        ({"llama_heads": {"1": [0]}, "llama_cfg": llama_cfg(2) | {"attention_bias": True}}, "o_proj has a bias"),
        ({"llama_heads": {"1": [0]}, "llama_cfg": llama_cfg(1) | {"num_attention_heads": 5}}, "do not divide"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, reason):
    with pytest.raises(Exception, match=reason):
        llamba_config(**{"llama_cfg": llama_cfg(2), **fields})
