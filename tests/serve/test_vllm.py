"""Llambas in vLLM give the tokens and the log-probabilities that they give here, however the requests come in.

The truth is one forward pass of our own model over each prompt with the answer that the server gave.
"""

import asyncio
import json
import random
import re
import signal
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch

from model_preparation.checkpoint.load import load_checkpoint
from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import make_tokenizer, seeded, tiny_config, tiny_llama_cfg, wait_until
from tests.serve.conftest import assert_scores_are_ours

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test_serving.sh makes an environment with it")
openai = pytest.importorskip("openai", reason="the client is installed with vLLM")

NEW_TOKENS = 16
CACHE = ("--kv-cache-memory-bytes", "256M")
BOS_TWICE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def server(serve, served_dirs, tmp_path_factory):
    """A graft of format pt, served with vLLM's own settings."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(BOS_TWICE)
    return serve(served_dirs["pt"], "--", *CACHE, "--chat-template", template)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        yield client


@pytest.fixture(scope="module")
def tight_server(serve, served_dirs):
    """The same graft where prompts are cut into pieces, and the cache is too small for the requests that run."""
    return serve(
        served_dirs["hf"],
        *("--model_name", "tight", "--", "--max-num-batched-tokens", 48, "--num-gpu-blocks-override", 20),
        *("--max-num-seqs", 16, "--enable-prefix-caching", *CACHE),
    )._replace(name="tight")


@pytest.fixture(scope="module")
def model(served_dirs):
    return load_checkpoint(served_dirs["hf"])[0]


def prompts_of(vocabulary: range, lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(vocabulary, k=length) for length in lengths]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    lengths = [1, 2, 3, 400, *random.Random(1).choices(range(1, 401), k=60)]
    return prompts_of(range(3, 54), lengths)


def ask(server, prompts: list[list[int]], **settings) -> list:
    """The answers to all prompts, sent at once."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600, max_retries=0)
    known = {"max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 0, **settings}
    extra = {"ignore_eos": True, "return_token_ids": True}

    async def all_of_them() -> list:
        async with client:
            return await asyncio.gather(
                *(
                    client.completions.create(model=server.name, prompt=prompt, extra_body=extra, **known)
                    for prompt in prompts
                )
            )

    return asyncio.run(all_of_them())


@torch.no_grad()
def assert_is_ours(model, prompt: list[int], choice, *, greedy: bool = True) -> None:
    """The answer is what our model takes for likeliest at each place, with the same log-probabilities.

    Args:
        greedy: False where tokens were drawn, and the log-probabilities alone can be the same.
    """
    answer = choice.token_ids
    assert len(answer) == NEW_TOKENS
    logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :].float()
    assert not greedy or logits.argmax(-1).tolist() == answer, f"of a prompt of {len(prompt)} tokens"
    ours = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(choice.logprobs.token_logprobs), ours, rtol=0, atol=1e-4)


def assert_all_ours(model, server, prompts: list[list[int]]) -> None:
    for prompt, answer in zip(prompts, ask(server, prompts), strict=True):
        assert_is_ours(model, prompt, answer.choices[0])


def metric(server, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))


def test_64_prompts_at_once(server, model, prompts):
    assert_all_ours(model, server, prompts)


def test_several_answers_to_one_prompt(server, model, prompts):
    answers = ask(server, prompts[:8], n=2, temperature=1.0)
    for prompt, answer in zip(prompts, answers, strict=False):
        assert [choice.index for choice in answer.choices] == [0, 1]
        for choice in answer.choices:
            assert_is_ours(model, prompt, choice, greedy=False)
    assert any(answer.choices[0].token_ids != answer.choices[1].token_ids for answer in answers)


def test_streaming_and_stop_words(server, client, prompts):
    whole = ask(server, prompts[4:5])[0].choices[0].text
    settings = {"model": server.name, "prompt": prompts[4], "max_tokens": NEW_TOKENS, "temperature": 0}
    chunks = client.completions.create(**settings, stream=True, extra_body={"ignore_eos": True})
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    word = whole.split()[3]
    stopped = client.completions.create(**settings, stop=[word], extra_body={"ignore_eos": True}).choices[0]
    assert stopped.text == whole[: whole.index(word)]
    assert stopped.finish_reason == "stop"


def test_chat_goes_through_the_template_with_one_bos(server, client, model):
    answer = client.chat.completions.create(
        model=server.name,
        messages=[{"role": "user", "content": "Ada likes jam . Ben likes tea . Ada likes"}],
        max_tokens=3,
        temperature=0,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    )
    prompt = answer.prompt_token_ids
    assert prompt == load_tokens("Ada likes jam . Ben likes tea . Ada likes")
    ours = model.generate(torch.tensor([prompt]), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert answer.choices[0].token_ids == ours[0, len(prompt) :].tolist()


def load_tokens(text: str) -> list[int]:
    from model_preparation.embedded.recall import BOS, WORDS

    return [WORDS.index(BOS), *map(WORDS.index, text.split())]


def test_a_cancelled_request_leaves_nothing_behind(server, client, model, prompts):
    for prompt in prompts[4:12]:
        stream = client.completions.create(
            model=server.name, prompt=prompt, max_tokens=100, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
    wait_until(lambda: metric(server, "vllm:num_requests_running") == 0)
    assert_all_ours(model, server, prompts[12:28])


def test_a_task_is_scored_through_the_server(server, served_dirs, tmp_path):
    assert_scores_are_ours(served_dirs["pt"], server, tmp_path / "results")


def test_a_prompt_too_long_is_refused(client, server):
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model=server.name, prompt=[5] * 600, max_tokens=1)


def test_killed_outright_it_leaves_no_process(server):
    """The last test of this server."""
    assert_ends_all(server, signal.SIGKILL, -signal.SIGKILL)


def test_prompts_cut_into_pieces_and_preempted(tight_server, model, prompts):
    assert_all_ours(model, tight_server, prompts)
    # Each answer outgrows its first block of 128 tokens, and of the 20 blocks three requests have 18 by then.
    assert_all_ours(model, tight_server, prompts_of(range(3, 54), [120] * 16, seed=2))
    assert metric(tight_server, "vllm:num_preemptions_total") > 0


def test_prefix_caching_is_off_and_says_so(tight_server, model):
    shared = prompts_of(range(3, 54), [300])[0]
    asked = [shared + ending for ending in prompts_of(range(3, 54), [1, 7, 40, 90], seed=5)]
    assert_all_ours(model, tight_server, asked)
    assert_all_ours(model, tight_server, asked)
    log = Path(re.search(r"^Log +(.*)$", tight_server.said.read_text(), re.MULTILINE)[1])
    assert "Prefix caching is off for Llambas" in log.read_text()


def test_sigterm_ends_all_processes(tight_server):
    """The last test of this server."""
    assert_ends_all(tight_server, signal.SIGTERM, 143)


def assert_ends_all(server, number: int, code: int) -> None:
    engine = psutil.Process(server.process.pid).children(recursive=True)
    assert len(engine) >= 2, "vLLM runs in processes of its own"
    assert server.end(number) == code
    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in engine))


@pytest.mark.parametrize("grafted", [[], [1, 2]], ids=["pure", "grafted"])
def test_tied_head_padded_vocabulary_shared_heads_and_scaled_rope(tmp_path, grafted, run_vllm):
    rope = {
        **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0},
        **{"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    }
    changes = (
        {"llama_layers": grafted, "llama_cfg": {**tiny_llama_cfg(), "head_dim": 32, "rope_parameters": rope}}
        if grafted
        else {}
    )
    ssm = {"d_state": 8, "n_v_heads": 4, "n_qk_heads": 2, "activation": "silu"}
    config = tiny_config(tie_embeddings=True, ssm_cfg=ssm, max_position_embeddings=512, **changes)
    assert config.padded_vocab_size > config.vocab_size
    model = seeded(LlambaForCausalLM(config), scale=0.3)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    prompts = prompts_of(range(256), [1, 2, 5, 17, 64, 130, 250])
    for prompt, choice in zip(prompts, run_vllm(tmp_path, prompts), strict=True):
        assert_is_ours(model, prompt, choice)


@pytest.fixture
def run_vllm(tmp_path_factory):
    """vLLM without a server, on a model's folder: the answers to prompts, in a process of its own."""
    import os
    import subprocess
    import sys
    from types import SimpleNamespace

    def run(folder: Path, prompts: list[list[int]]) -> list:
        given = tmp_path_factory.mktemp("prompts") / "prompts.json"
        given.write_text(json.dumps({"folder": str(folder), "prompts": prompts, "new_tokens": NEW_TOKENS}))
        script = Path(__file__).with_name("generate_by_vllm.py")
        done = subprocess.run(
            [sys.executable, str(script), str(given)],
            env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return [
            SimpleNamespace(token_ids=answer["ids"], logprobs=SimpleNamespace(token_logprobs=answer["logprobs"]))
            for answer in json.loads(given.with_suffix(".out").read_text())
        ]

    return run
