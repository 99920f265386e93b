"""Several documents in one row: where `position_ids` start again at 0, no layer sees what came before."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DataCollatorWithFlattening

from model_preparation.llamba import LlambaCache, LlambaForCausalLM
from model_preparation.llamba import mixer as mixer_module
from model_preparation.llamba.cache_llamba import CACHE_NAME
from tests.conftest import on_devices, seeded, tiny_config, tiny_llama_cfg


def make(layers: list[int], implementation: str = "sdpa", heads: dict | None = None) -> LlambaForCausalLM:
    cfg = tiny_llama_cfg() if layers or heads else None
    config = tiny_config(llama_layers=layers, llama_heads=heads, llama_cfg=cfg)
    model = seeded(LlambaForCausalLM(config), seed=17).double()
    model.set_attn_implementation(implementation)
    return model


MODELS = {"base": make([]), "grafted": make([1, 3]), "eager": make([0], "eager").float()}
MODELS["heads"] = make([3], heads={"0": [1], "2": [0, 1]})


def documents(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator) for length in lengths]


def packed(texts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """One row of the documents after each other: ids and position_ids, (1, tokens)."""
    return torch.cat(texts)[None], torch.cat([torch.arange(len(text)) for text in texts])[None]


def alone(model: LlambaForCausalLM, texts: list[Tensor]) -> Tensor:
    """Run each document alone. Return the logits of all, concatenated: (tokens, vocabulary)."""
    return torch.cat([model(text[None]).logits[0] for text in texts])


LENGTHS = st.lists(st.integers(1, 12), min_size=2, max_size=5)


@pytest.mark.parametrize("name", MODELS)
@given(lengths=LENGTHS, data=st.data())
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_each_document_is_as_if_alone(name, lengths, data):
    """There is a second row with other documents. Padding may be anywhere between tokens.

    The rows may also be given in pieces, with a cache.
    """
    model = MODELS[name]
    tokens = sum(lengths)
    rows = [documents(lengths), documents(data.draw(st.permutations(lengths)), seed=1)]
    wanted = [alone(model, texts) for texts in rows]
    with_padding = data.draw(st.booleans())
    padded = tokens + (data.draw(st.integers(1, 6)) if with_padding else 0)
    ids, positions = torch.full((2, padded), 77), torch.zeros(2, padded, dtype=torch.long)
    mask = torch.zeros(2, padded, dtype=torch.long)
    for row, texts in enumerate(rows):
        real = torch.tensor(sorted(data.draw(st.permutations(range(padded)))[:tokens]))
        ids[row, real], positions[row, real] = (values[0] for values in packed(texts))
        mask[row, real] = 1
    cache = LlambaCache(model.config) if data.draw(st.booleans()) else None
    cuts = sorted(data.draw(st.sets(st.integers(1, padded - 1)))) if cache is not None else []
    logits = []
    for start, end in zip([0, *cuts], [*cuts, padded], strict=True):
        given_mask = {"attention_mask": mask[:, :end]} if with_padding else {}
        places = positions[:, start:end]
        logits.append(model(ids[:, start:end], position_ids=places, **{CACHE_NAME: cache}, **given_mask).logits)
    # The norms compute in float32: a change of the last bit in float64 may become a change of the last bit in float32.
    # "eager" is in float32 as a whole.
    tolerance = 1e-4 if name == "eager" else 1e-6
    for row, found in enumerate(torch.cat(logits, 1)):
        torch.testing.assert_close(found[mask[row].bool()], wanted[row], rtol=tolerance, atol=tolerance)


@on_devices
@pytest.mark.parametrize("name", MODELS)
def test_float32_and_gradients(name, device, monkeypatch):
    """Documents cross the borders of the scan's chunks, and of the blocks of tokens that a mixer computes at once."""
    monkeypatch.setattr(mixer_module, "BLOCK_TOKENS", 32)
    texts = [text.to(device) for text in documents([5, 70, 1, 2, 41])]
    ids, positions = (each.to(device) for each in packed(texts))
    found, wanted = [], []
    model = copy.deepcopy(MODELS[name]).float().train().to(device)
    for values, into in (
        (model(ids, position_ids=positions).logits[0], found),
        (alone(model, texts), wanted),
    ):
        model.zero_grad()
        values.square().mean().backward()
        into += [values.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5 * max(1.0, right.abs().max().item()))


def test_transformers_own_collator():
    """The collator packs a Trainer's examples into one row. Its batch says in four ways where documents begin.

    These are `position_ids`, `seq_idx`, `cu_seq_lens` and the labels -100.
    """
    model = MODELS["grafted"]
    texts = documents([6, 3, 9])
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    batch = collator([{"input_ids": text.tolist()} for text in texts])
    with torch.no_grad():
        logits = model(**batch).logits[0]
    torch.testing.assert_close(logits, alone(model, texts), rtol=1e-9, atol=1e-9)


def test_generation_continues_the_last_document():
    model = MODELS["grafted"]
    texts = documents([7, 5])
    ids, positions = packed(texts)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(ids, position_ids=positions, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(found[0, 12:], model.generate(texts[1][None], **options)[0, 5:])


@pytest.mark.parametrize("name", MODELS)
def test_positions_that_go_back_or_repeat_are_refused(name):
    ids = torch.arange(6)[None]
    for positions in ([0, 1, 2, 1, 2, 3], [0, 1, 0, 1, 1, 2]):
        with pytest.raises(ValueError, match=r"position_ids of row 0 go from \d to 1"):
            MODELS[name](ids, position_ids=torch.tensor([positions]))


@torch.no_grad()
def test_flash_attention_that_would_mix_is_refused():
    """Its kernels take no mask: they keep documents apart by position_ids, in a row without padding or cache."""
    model = copy.deepcopy(MODELS["grafted"])
    model.config._attn_implementation = "flash_attention_2"
    ids, positions = packed(documents([4, 5]))
    for more in ({"attention_mask": torch.tensor([[0] + [1] * 8])}, {CACHE_NAME: LlambaCache(model.config)}):
        with pytest.raises(ValueError, match=r'flash_attention_2 would mix the doc.*set_attn_implementation\("sdpa"\)'):
            model(ids, position_ids=positions, **more)
