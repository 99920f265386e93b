"""Cached generation equals full recomputation, token for token, in every way people call `generate`."""

import copy
import functools

import pytest
import torch
from transformers import DynamicCache

from model_preparation.llamba import LlambaCache, LlambaForCausalLM
from model_preparation.llamba.cache_llamba import CACHE_NAME
from tests.conftest import VOCABULARY, on, on_devices, seeded, tiny_config, tiny_llama_cfg

NEW_TOKENS = 6
GRAFTS = {"base": [], "first": [0], "middle": [1, 3], "all": [0, 1, 2, 3], "heads": [3]}


@pytest.fixture(scope="module", params=GRAFTS, ids=list(GRAFTS))
def model(request) -> LlambaForCausalLM:
    layers = GRAFTS[request.param]
    heads = {"0": [1], "2": [0, 1]} if request.param == "heads" else None
    config = tiny_config(llama_layers=layers, llama_heads=heads, llama_cfg=tiny_llama_cfg() if layers else None)
    return seeded(LlambaForCausalLM(config), seed=11)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(100 * length + seed))


@torch.no_grad()
def greedy_without_cache(model, ids: torch.Tensor, new_tokens: int = NEW_TOKENS) -> torch.Tensor:
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@functools.cache
def continued(model, length: int) -> torch.Tensor:
    """What comes after the prompt of that length."""
    return greedy_without_cache(model, prompt(length))[0, length:]


def generate(model, ids, **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **kwargs}
    return model.generate(ids, **kwargs)


def padded_batch(lengths: list[int], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths in one batch, padded with a token that would change everything if it were seen."""
    longest = max(lengths)
    ids = torch.full((len(lengths), longest), 77)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = prompt(length)[0], 1
    return ids, mask


@on_devices
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9, 30])
def test_greedy(model, length, device):
    model, ids = on(device, model), prompt(length).to(device)
    assert torch.equal(generate(model, ids, attention_mask=torch.ones_like(ids)), greedy_without_cache(model, ids))


def test_a_cache_is_used_and_grows_only_with_attention_layers(model):
    out = generate(model, prompt(5), return_dict_in_generate=True)
    cache = out[CACHE_NAME]
    assert cache.get_seq_length() == 5 + NEW_TOKENS - 1
    for kind, layer in zip(model.config.layer_types, cache.layers, strict=True):
        if kind != "linear_attention":
            assert layer.keys.shape == (1, 1, 5 + NEW_TOKENS - 1, 16)
        if kind != "full_attention":
            assert layer.recurrent_states[0].shape == (1, 2, 16, 8)
            assert layer.recurrent_states[0].dtype == torch.float32
            assert layer.conv_states[0].shape == (1, 64, 4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(model, side):
    lengths = [7, 1, 4, 2]
    ids, mask = padded_batch(lengths, side)
    out = generate(model, ids, attention_mask=mask)
    assert torch.equal(out[:, : ids.shape[1]], ids)  # the prompts come back as they were given
    for row, length in enumerate(lengths):
        assert torch.equal(out[row, ids.shape[1] :], continued(model, length)), (side, length)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_of_embeddings(model, side):
    lengths = [7, 1, 4, 2]
    ids, mask = padded_batch(lengths, side)
    out = generate(model, None, inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
    for row, length in enumerate(lengths):
        assert torch.equal(out[row], continued(model, length)), (side, length)


@on_devices
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_real_logits(model, side, device):
    lengths = [7, 1, 4, 2]
    model = on(device, model)
    ids, mask = (each.to(device) for each in padded_batch(lengths, side))
    logits = model(ids, attention_mask=mask).logits
    other = model(ids.where(mask.bool(), 3), attention_mask=mask).logits
    for row, length in enumerate(lengths):
        place = mask[row].bool()
        assert torch.equal(logits[row, place], other[row, place])  # whatever stands at the padding
        alone = model(prompt(length).to(device)).logits[0]
        torch.testing.assert_close(logits[row, place], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_right_padded_prefill_leaves_a_sound_cache(model, side):
    """The cached state of a padded row is the state after its last real token (transformers#48256)."""
    lengths = [6, 2, 1]
    ids, mask = padded_batch(lengths, side)
    cache = LlambaCache(model.config)
    model(ids, attention_mask=mask, past_key_values=cache)
    more = torch.cat([prompt(3, seed=row) for row in range(3)])
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    logits = model(more, attention_mask=mask, past_key_values=cache).logits
    for row, length in enumerate(lengths):
        whole = torch.cat([prompt(length)[0], more[row]]).unsqueeze(0)
        torch.testing.assert_close(logits[row], model(whole).logits[0, length:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pieces", [[4, 5], [1, 1, 7], [3, 1, 2, 3]])
@torch.no_grad()
def test_several_tokens_per_cached_step(model, pieces):
    ids = prompt(sum(pieces))
    cache = LlambaCache(model.config)
    logits = [model(piece, past_key_values=cache).logits for piece in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_inside_a_continuation(model):
    """Rows that continue by different numbers of tokens, the shorter ones padded."""
    start = prompt(5).repeat(2, 1)
    more, lengths = prompt(4).repeat(2, 1), [4, 2]
    for side in ("left", "right"):
        cache = LlambaCache(model.config)
        model(start, past_key_values=cache)
        real = torch.ones(2, 4, dtype=torch.long)
        real[1, slice(0, 2) if side == "left" else slice(2, 4)] = 0
        mask = torch.cat([torch.ones_like(start), real], 1)
        logits = model(more, attention_mask=mask, past_key_values=cache).logits
        for row, length in enumerate(lengths):
            piece = more[row, real[row].bool()]
            whole = torch.cat([start[row], piece]).unsqueeze(0)
            found = logits[row, real[row].bool()]
            torch.testing.assert_close(found, model(whole).logits[0, -length:], rtol=1e-4, atol=1e-4)


@on_devices
@pytest.mark.parametrize("chunk", [1, 3, 20])
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_in_chunks(model, chunk, side, device):
    model = on(device, model)
    ids, mask = (each.to(device) for each in padded_batch([7, 4], side))
    out = generate(model, ids, attention_mask=mask, prefill_chunk_size=chunk)
    assert torch.equal(out, generate(model, ids, attention_mask=mask))


def test_a_cache_goes_by_either_name(model):
    ids = prompt(6)
    for call in (model, model.backbone):
        assert CACHE_NAME in call(ids, use_cache=True)
        for name in ("cache", "past_key_values"):
            cache = LlambaCache(model.config)
            assert call(ids, **{name: cache})[CACHE_NAME] is cache
            assert cache.get_seq_length() == 6
        with pytest.raises(TypeError, match="two names of one argument"):
            call(ids, cache=cache, past_key_values=cache)
    out = [generate(model, ids, **{name: LlambaCache(model.config)}) for name in ("cache", "past_key_values")]
    assert torch.equal(*out)


def test_nothing_is_swallowed(model):
    for call in (model, model.backbone):
        with pytest.raises(TypeError, match=r"no argument attention_masks, windows.*5\.16\.1 to .*is installed"):
            call(prompt(4), attention_masks=None, windows=3)
        with pytest.raises(ValueError, match="Mamba layers are causal"):
            call(prompt(4), is_causal=False)
        with pytest.raises(ValueError, match="give position_ids"):
            call(prompt(4), seq_idx=torch.zeros(1, 4, dtype=torch.int32))
        assert call(prompt(4), output_hidden_states=True).hidden_states is not None


def test_generate_continues_a_cache(model):
    ids = prompt(6)
    first = generate(model, ids, return_dict_in_generate=True)
    more = torch.cat([first.sequences, prompt(3, seed=1)], 1)
    again = generate(model, more, past_key_values=first[CACHE_NAME])
    assert torch.equal(again, greedy_without_cache(model, more))
    assert first[CACHE_NAME].get_seq_length() == more.shape[1] + NEW_TOKENS - 1  # no token was run twice


def test_generate_continues_a_right_padded_cache(model):
    """Padding in the middle of the sequence: positions count real tokens only."""
    ids, mask = padded_batch([6, 2], "right")
    cache = LlambaCache(model.config)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    more = torch.cat([prompt(3, seed=row) for row in range(2)])
    mask = torch.cat([mask, torch.ones_like(more)], 1)
    out = generate(model, torch.cat([ids, more], 1), attention_mask=mask, past_key_values=cache)
    for row, length in enumerate([6, 2]):
        whole = torch.cat([prompt(length)[0], more[row]]).unsqueeze(0)
        assert torch.equal(out[row, 9:], greedy_without_cache(model, whole)[0, length + 3 :])


def test_a_forked_cache_leaves_the_original_alone(model):
    cache = LlambaCache(model.config)
    with torch.no_grad():
        model(prompt(5), past_key_values=cache)
        before = model(prompt(2), past_key_values=copy.deepcopy(cache)).logits
        model(prompt(4), past_key_values=copy.deepcopy(cache))
        assert torch.equal(before, model(prompt(2), past_key_values=cache).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_beam_search(model, side):
    ids, mask = padded_batch([5, 2], side)
    out = generate(model, ids, attention_mask=mask, num_beams=3)
    for row, length in enumerate([5, 2]):
        wanted = generate(model, prompt(length), num_beams=3, use_cache=False)
        assert torch.equal(out[row, 5:], wanted[0, length:])


def test_sampling(model):
    ids = prompt(6)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(generate(model, ids, do_sample=True, temperature=1.5, top_k=0, use_cache=use_cache))
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], greedy_without_cache(model, ids))


@torch.no_grad()
def test_cache_rows_can_be_repeated_and_selected(model):
    cache = LlambaCache(model.config)
    rows = torch.cat([prompt(4, seed=row) for row in range(2)])
    model(rows, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    token = prompt(1).repeat(2, 1)
    found = model(token, past_key_values=cache).logits
    wanted = model(torch.cat([rows.flip(0), token], 1)).logits[:, -1:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_reset_cache_starts_again(model):
    cache = LlambaCache(model.config)
    first = model(prompt(4), past_key_values=cache).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(first, model(prompt(4), past_key_values=cache).logits)


def test_padded_vocabulary_rows_are_never_generated():
    model = seeded(LlambaForCausalLM(tiny_config(vocab_size=VOCABULARY - 3)))
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY - 3 :] = 1e4  # would win wherever they could be chosen
        model.lm_head.weight[VOCABULARY - 3 :, ::2] = -1e4
    assert model.lm_head.weight.shape[0] == 264
    assert model(prompt(3)).logits.shape[-1] == VOCABULARY - 3
    for kwargs in ({}, {"do_sample": True}, {"num_beams": 3}):
        assert generate(model, prompt(3), **kwargs).max() < VOCABULARY - 3


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_grafted_layers_are_causal(implementation):
    config = tiny_config(llama_layers=[1, 2], llama_cfg=tiny_llama_cfg())
    model = seeded(LlambaForCausalLM(config))
    model.set_attn_implementation(implementation)
    ids = prompt(12)
    changed = ids.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 256
    before, after = model(ids).logits, model(changed).logits
    assert torch.equal(before[:, :8], after[:, :8])
    assert not torch.equal(before[:, 8:], after[:, 8:])


@torch.no_grad()
def test_attention_implementations_agree():
    config = tiny_config(llama_layers=[0, 2], llama_cfg=tiny_llama_cfg())
    model = seeded(LlambaForCausalLM(config))
    ids, mask = padded_batch([9, 4], "left")
    found = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found[implementation] = model(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=1e-4, atol=1e-4)


def test_clear_errors(model):
    ids = prompt(4)
    with pytest.raises(ValueError, match=r"no place for the states of Mamba layers.*LlambaCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"\(batch, tokens\)"):
        model(ids, attention_mask=torch.ones(1, 1, 4, 4))
    cache = LlambaCache(model.config)
    model(ids, past_key_values=cache)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    with pytest.raises(ValueError, match="pad on the left"):
        model.generate(prompt(6), attention_mask=mask, past_key_values=cache, max_new_tokens=2)
