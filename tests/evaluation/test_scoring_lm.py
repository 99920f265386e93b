"""ScoringLM gives stock lm-eval's answers to any requests: common beginnings, long continuations, cut prompts."""

import logging
import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.prefix_cache import can_share, shared
from model_preparation.evaluation.scoring_lm import ScoringLM
from model_preparation.llamba import LlambaCache, LlambaForCausalLM
from tests.conftest import VOCABULARY, make_tokenizer, on, on_devices, seeded, tiny_config, tiny_llama_cfg

WORDS = ["river", "cell", "law", "price", " ", "\n", "Answer:", " A", " B", "é", "Ω"]


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return seeded(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)))


def llamba(layers: list[int], **changes) -> LlambaForCausalLM:
    llama_cfg = tiny_llama_cfg() if layers else None
    limit = {"max_position_embeddings": 2048} if layers else {}
    return seeded(LlambaForCausalLM(tiny_config(llama_layers=layers, llama_cfg=llama_cfg, **limit, **changes)))


MODELS = {
    "llama": llama(),
    "base": llamba([]),
    "grafted": llamba([1, 2]),
    "grafted first": llamba([0], ssm_cfg={"d_state": 8, "n_v_heads": 2, "n_qk_heads": 1, "chunk_size": 4}),
    "all grafted": llamba([0, 1, 2, 3]),
}


@pytest.fixture(autouse=True)
def quiet_lm_eval(caplog):
    caplog.set_level(logging.CRITICAL, logger="lm_eval")


def requests(pairs: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, index, ("task", index, 1)) for index, pair in enumerate(pairs)]


def assert_same_answers(model, pairs, *, batch_size=3, atol=2e-5, max_length=None):
    # Stock's cache of logits gives wrong positions if two requests divide the same text at different places.
    stock = HFLM(pretrained=model, tokenizer=make_tokenizer(), batch_size=2, max_length=max_length, logits_cache=False)
    ours = ScoringLM(model, make_tokenizer(), batch_size, allow_truncation=max_length is not None)
    ours._max_length = max_length
    wanted = stock.loglikelihood(requests(pairs), disable_tqdm=True)
    found = ours.loglikelihood(requests(pairs), disable_tqdm=True)
    for (value, greedy), (wanted_value, wanted_greedy) in zip(found, wanted, strict=True):
        assert value == pytest.approx(wanted_value, rel=1e-5, abs=atol)
        assert greedy == wanted_greedy


def questions(beginning: str, count: int, seed: int = 0) -> list[tuple[str, str]]:
    rng = random.Random(seed)
    contexts = [beginning + "".join(rng.choices(WORDS, k=rng.randrange(1, 12))) + "?" for _ in range(count)]
    return [(context, letter) for context in contexts for letter in (" A", " B", " C", " D")]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "beginning", ["", "Short", "The following are multiple choice questions about rivers.\n\n" * 4]
)
def test_choices_of_one_token(name, beginning):
    assert_same_answers(MODELS[name], questions(beginning, 7))


@pytest.mark.parametrize("name", MODELS)
def test_continuations_of_many_tokens_that_share_their_context(name):
    pairs = [
        (f"A description of thirty characters. The {word} ", end) for word in WORDS for end in ("is old", "fell", "")
    ]
    assert_same_answers(MODELS[name], [(context, end + ".") for context, end in pairs], batch_size="auto")


@given(st.data())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_requests(data):
    name = data.draw(st.sampled_from(sorted(MODELS)))
    text = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)
    beginning = data.draw(text) * data.draw(st.integers(0, 5))
    pairs = data.draw(st.lists(st.tuples(text, text.filter(bool)), min_size=1, max_size=6))
    pairs = [(beginning + context, continuation) for context, continuation in pairs]
    assume(all(context.strip() or not context for context, _ in pairs))  # stock fails on blanks alone
    assert_same_answers(MODELS[name], pairs, batch_size=data.draw(st.sampled_from([1, 2, 5, "auto"])))


@pytest.mark.parametrize("name", ["llama", "grafted"])
def test_prompts_longer_than_the_model_takes_are_cut_on_the_left(name):
    pairs = [("common beginning of all " + "long " * length, " A") for length in (2, 5, 9, 40, 41)]
    assert_same_answers(MODELS[name], pairs, max_length=64)


def test_a_continuation_longer_than_the_model_takes_is_refused():
    lm = ScoringLM(MODELS["llama"], make_tokenizer(), 1, allow_truncation=True)
    lm._max_length = 8
    with pytest.raises(SurgeryError, match="has 12 tokens, but the model"):
        lm.loglikelihood(requests([("a", "b" * 12)]), disable_tqdm=True)


def test_rolling_answers_are_stock_s():
    model = MODELS["grafted"]
    stock, ours = HFLM(pretrained=model, tokenizer=make_tokenizer()), ScoringLM(model, make_tokenizer(), "auto")
    rolling = [Instance("loglikelihood_rolling", {}, ("a long text " * 9,), 0, ("task", 0, 1))]
    wanted = stock.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_generated_answers_are_stock_s(name, monkeypatch):
    """Prompts of unequal lengths, and one prompt twice; with one stop sequence, several and none."""
    model = MODELS[name]
    stock, ours = HFLM(pretrained=model, tokenizer=make_tokenizer()), ScoringLM(model, make_tokenizer(), "auto")
    prompts = ["A text", "A text", *(context for context, _ in questions("Once ", 3)[::4]), "x" * 40]
    generated = [
        Instance("generate_until", {}, (prompt, {"until": until, "max_gen_toks": most}), 0, ("task", index, 1))
        for until, most in ((["x"], 6), (["e", "o", "\n"], 12), ([], 4))
        for index, prompt in enumerate(prompts)
    ]
    wanted = stock.generate_until(generated, disable_tqdm=True)
    monkeypatch.setattr(HFLM, "_model_generate", None)  # ours takes its own loop
    assert ours.generate_until(generated, disable_tqdm=True) == wanted


def test_every_request_is_told_once():
    told = []
    lm = ScoringLM(MODELS["grafted"], make_tokenizer(), 2, told.append)
    lm.loglikelihood(requests(questions("The same beginning for all.", 5)), disable_tqdm=True)
    assert sum(told) == 20
    assert max(told) == 8  # two rows at once, of four choices each


def test_the_common_beginning_runs_once_and_only_scored_positions_get_logits():
    model, tokens, logits = MODELS["grafted"], [], []
    hooks = [
        model.backbone.embedding.register_forward_pre_hook(lambda _, inputs: tokens.append(inputs[0].numel())),
        model.lm_head.register_forward_pre_hook(lambda _, inputs: logits.append(inputs[0].shape[:-1].numel())),
    ]
    pairs = [("x" * 100 + letter, " ") for letter in "abcdefgh"]
    ScoringLM(model, make_tokenizer(), 8).loglikelihood(requests(pairs), disable_tqdm=True)
    for hook in hooks:
        hook.remove()
    assert tokens == [100, 8]
    assert logits == [1, 8]


def test_when_memory_runs_out_auto_goes_on_with_half_as_many_rows(monkeypatch):
    model, sizes = MODELS["base"], []
    forward = model.forward

    def small_card(input_ids, **kwargs):
        sizes.append(len(input_ids))
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", small_card)
    pairs = [(f"question {number}", " A") for number in range(10)]
    found = ScoringLM(model, make_tokenizer(), "auto").loglikelihood(requests(pairs), disable_tqdm=True)
    assert sizes == [1, 10, 5, 2, 2, 2, 2, 2]
    monkeypatch.undo()
    assert found == ScoringLM(model, make_tokenizer(), 2).loglikelihood(requests(pairs), disable_tqdm=True)
    monkeypatch.setattr(model, "forward", small_card)
    with pytest.raises(torch.OutOfMemoryError):  # a batch size that was asked for is kept
        ScoringLM(model, make_tokenizer(), 4).loglikelihood(requests(pairs), disable_tqdm=True)


# For a single token, the mixer runs `step`, which changes states in place.
@pytest.mark.parametrize(("rows", "length"), [(2, 3), (2, 1), (1, 1)])
def test_a_shared_cache_is_not_changed_by_what_comes_after(rows, length):
    model = MODELS["grafted"]
    tokens = torch.arange(rows * length).view(rows, length)
    prefix = LlambaCache(model.config)
    with torch.no_grad():
        model(torch.arange(20)[None], past_key_values=prefix, use_cache=True)
        assert can_share(prefix)
        first = model(tokens, past_key_values=shared(prefix, rows), use_cache=True).logits
        again = model(tokens, past_key_values=shared(prefix, rows), use_cache=True).logits
        whole = model(torch.cat([torch.arange(20).expand(rows, -1), tokens], 1)).logits[:, 20:]
    assert prefix.get_seq_length() == 20
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close(first, whole, rtol=1e-5, atol=1e-5)


@on_devices
@pytest.mark.parametrize("name", MODELS)
def test_on_a_device(name, device):
    pairs = questions("A description that all questions begin with.", 9)
    assert_same_answers(on(device, MODELS[name]), pairs, atol=2e-5 if device == "cpu" else 1e-3)
