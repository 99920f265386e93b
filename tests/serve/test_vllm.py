"""Llambas in vLLM give the tokens and the log-probabilities that they give here, however the requests come in.

The truth is one forward pass of our own model over each prompt with the answer that the server gave.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from model_preparation.checkpoint.load import load_checkpoint
from model_preparation.llamba import LlambaForCausalLM
from tests.conftest import PACKAGE, make_tokenizer, seeded, tiny_config, tiny_llama_cfg, wait_until
from tests.serve.conftest import assert_scores_are_ours, free_port

pytest.importorskip("vllm", reason="vLLM is not installed; scripts/test_serving.sh makes an environment with it")
openai = pytest.importorskip("openai", reason="the client is installed with vLLM")

NEW_TOKENS = 16
KEY = "secret"
EMBEDDED = PACKAGE / "embedded" / "tiny_llamba"
CACHE = ("--kv-cache-memory-bytes", "256M")
BOS_TWICE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def server(serve, served_dirs, tmp_path_factory):
    """A graft of format pt, served with two flags of vLLM: the cache's size and a chat template."""
    template = tmp_path_factory.mktemp("template") / "chat.jinja"
    template.write_text(BOS_TWICE)
    return serve(served_dirs["pt"], "--api_key", KEY, "--", *CACHE, "--chat-template", template)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        yield client


@pytest.fixture(scope="module")
def model(served_dirs):
    return load_checkpoint(served_dirs["hf"])[0]


def prompts_of(vocabulary: range, lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(vocabulary, k=length) for length in lengths]


def pieces_of(text: list[int], lengths: list[int], seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [text[start : start + length] for length in lengths for start in [rng.randrange(len(text) - length)]]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    lengths = [1, 2, 3, 400, *random.Random(1).choices(range(1, 401), k=60)]
    return prompts_of(range(3, 54), lengths)


def ask(server, prompts: list[list[int]], **settings) -> list:
    """The answers to all prompts, sent at once."""
    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, timeout=600, max_retries=0)
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
def assert_is_ours(
    model, prompt: list[int], answer: list[int], logprobs: list[float], *, greedy: bool = True, rounding: float = 1e-4
) -> float:
    """The answer is what our model takes for likeliest at each place, with the same log-probabilities.

    Args:
        greedy: False where tokens were drawn, and the log-probabilities alone can be the same.
        rounding: how far two log-probabilities may be apart.

    Returns:
        How far they are apart at most.
    """
    assert len(answer) == NEW_TOKENS
    logits = model(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :].float()
    assert not greedy or logits.argmax(-1).tolist() == answer, f"of a prompt of {len(prompt)} tokens"
    ours = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(logprobs), ours, rtol=0, atol=rounding)
    return (torch.tensor(logprobs) - ours).abs().max().item()


def assert_all_ours(model, server, prompts: list[list[int]], **settings) -> list[float]:
    found = [answer.choices[0] for answer in ask(server, prompts)]
    return [
        assert_is_ours(model, prompt, choice.token_ids, choice.logprobs.token_logprobs, **settings)
        for prompt, choice in zip(prompts, found, strict=True)
    ]


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
            assert_is_ours(model, prompt, choice.token_ids, choice.logprobs.token_logprobs, greedy=False)
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
    assert_scores_are_ours(served_dirs["pt"], server, tmp_path / "results", OPENAI_API_KEY=KEY)


def test_the_key_is_needed(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_prompt_too_long_is_refused(client, server):
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model=server.name, prompt=[5] * 600, max_tokens=1)


def test_killed_outright_it_leaves_no_process(server):
    """The last test of this server."""
    assert_ends_all(server.process, signal.SIGKILL, -signal.SIGKILL)


def test_sigterm_ends_all_processes_even_before_it_is_ready(served_dirs, tmp_path):
    with (tmp_path / "said.txt").open("wb") as output:
        command = [sys.executable, str(PACKAGE / "serve_checkpoint.py"), "--checkpoint", str(served_dirs["hf"])]
        process = subprocess.Popen([*command, "--port", str(free_port())], stdout=output, stderr=subprocess.STDOUT)
    wait_until(lambda: runs_engine(process), alive=lambda: process.poll() is None)
    assert_ends_all(process, signal.SIGTERM, 143)


def assert_ends_all(process: subprocess.Popen, number: int, code: int) -> None:
    assert runs_engine(process)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(120) == code
    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in started))


def runs_engine(process: subprocess.Popen) -> bool:
    """Whether vLLM's engine has started: a process that names itself VLLM::EngineCore."""
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # vLLM also starts programs that end at once
            if "VLLM::EngineCore" in " ".join(child.cmdline()):
                return True
    return False


# Prompts are cut into pieces, and the cache is too small for the requests that run.
TIGHT = {
    "max_num_batched_tokens": 48,
    "num_gpu_blocks_override": 20,
    "max_num_seqs": 16,
    "enable_prefix_caching": True,
}


def tight_prompts(prompts: list[list[int]], make: Callable) -> list[list[int]]:
    """`prompts`; some prompts that begin alike, twice; and some that outgrow their first block of 128 tokens.

    Three such requests hold 18 of the 20 blocks, and then need three more.

    Args:
        make: gives prompts of these lengths, from a seed.
    """
    (shared,) = make([300])
    alike = [shared + ending for ending in make([1, 7, 40, 90], seed=5)]
    return [*prompts, *alike, *alike, *make([120] * 16, seed=2)]


ROPES = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        **{"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        "original_max_position_embeddings": 64,
    },
}


def make_odd_model(folder: Path, rope: str | None) -> LlambaForCausalLM:
    """Its head is tied, its vocabulary padded, and heads share keys. With a kind of rope it has grafted layers."""
    rope_parameters = {"rope_type": rope, "rope_theta": 10000.0, **ROPES.get(rope, {})}
    llama_cfg = {**tiny_llama_cfg(), "head_dim": 32, "rope_parameters": rope_parameters}
    config = tiny_config(
        tie_embeddings=True,
        ssm_cfg={"d_state": 8, "n_v_heads": 4, "n_qk_heads": 2, "activation": "silu"},
        max_position_embeddings=512,
        **({} if rope is None else {"llama_layers": [1, 2], "llama_cfg": llama_cfg}),
    )
    assert config.padded_vocab_size > config.vocab_size
    model = seeded(LlambaForCausalLM(config), scale=0.3)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def odd_models(tmp_path_factory) -> dict[str, tuple[Path, LlambaForCausalLM]]:
    """(folder, model) by name."""
    found = {"embedded": (EMBEDDED, LlambaForCausalLM.from_pretrained(EMBEDDED))}
    for name in ("pure", *ROPES):
        folder = tmp_path_factory.mktemp(name)
        found[name] = folder, make_odd_model(folder, None if name == "pure" else name)
    return found


@pytest.fixture(scope="module")
def by_vllm(served_dirs, odd_models, prompts, tmp_path_factory) -> tuple[list[dict], list[dict], str]:
    """(cases, what vLLM gave for each, all that it printed); see generate_by_vllm.py. No server runs."""
    graft = {"folder": str(served_dirs["hf"]), "prompts": prompts}
    cases = [
        {**graft, "options": TIGHT, "prompts": tight_prompts(prompts, partial(prompts_of, range(3, 54)))},
        {**graft, "options": {"tensor_parallel_size": 2}},
        {**graft, "options": {"kv_cache_memory_bytes": 4096}},
        *(
            {"folder": str(folder), "prompts": prompts_of(range(model.config.vocab_size), [1, 2, 5, 17, 64, 130, 250])}
            for folder, model in odd_models.values()
        ),
    ]
    return run_vllm(cases, tmp_path_factory.mktemp("cases"))


def run_vllm(cases: list[dict], folder: Path) -> tuple[list[dict], list[dict], str]:
    (folder / "cases.json").write_text(
        json.dumps([{"options": {}, "new_tokens": NEW_TOKENS, **case} for case in cases])
    )
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("generate_by_vllm.py")), str(folder / "cases.json")],
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return cases, json.loads((folder / "cases.out").read_text()), done.stdout


def assert_case_is_ours(model, case: dict, found: dict, **settings) -> list[float]:
    return [
        assert_is_ours(model, prompt, answer["ids"], answer["logprobs"], **settings)
        for prompt, answer in zip(case["prompts"], found["answers"], strict=True)
    ]


def test_prompts_cut_into_pieces_begun_alike_and_preempted(by_vllm, model):
    cases, found, said = by_vllm
    assert_case_is_ours(model, cases[0], found[0])
    assert found[0]["preemptions"] > 0
    assert "Prefix caching is off for Llambas" in said


def test_what_vllm_refuses(by_vllm):
    _, found, _ = by_vllm
    assert "Llambas are served without tensor parallelism" in found[1]["error"]
    assert "No available memory for the cache" in found[2]["error"]


@pytest.mark.parametrize("name", ["embedded", "pure", *ROPES])
def test_tied_heads_padded_vocabularies_shared_heads_and_kinds_of_rope(by_vllm, odd_models, name):
    cases, found, _ = by_vllm
    number = [case["folder"] for case in cases].index(str(odd_models[name][0]))
    assert_case_is_ours(odd_models[name][1], cases[number], found[number])


@pytest.mark.skipif("SERVED_CHECKPOINT" not in os.environ, reason="SERVED_CHECKPOINT names no checkpoint of format hf")
def test_a_checkpoint_of_yours(serve, tmp_path):
    """64 prompts at once through the client; then some that are cut into pieces and preempted: minutes."""
    folder = os.environ["SERVED_CHECKPOINT"]
    model, tokenizer = load_checkpoint(folder, dtype="float32")
    pieces = partial(pieces_of, tokenizer((PACKAGE.parent / "README.md").read_text())["input_ids"])
    prompts = pieces([1, 2, 3, 400, *random.Random(1).choices(range(1, 401), k=60)])
    server = serve(Path(folder), "--dtype", "float32", "--api_key", KEY, "--", *CACHE, "--max-model-len", 512)
    # A real model rounds more than a small one.
    furthest = assert_all_ours(model, server, prompts, rounding=5e-4)
    server.end()
    options = {**TIGHT, "max_model_len": 512}
    cases, found, _ = run_vllm(
        [{"folder": folder, "prompts": tight_prompts(prompts[:8], pieces), "options": options}], tmp_path
    )
    furthest += assert_case_is_ours(model, cases[0], found[0], rounding=5e-4)
    assert found[0]["preemptions"] > 0
    print(f"{len(furthest)} prompts: the same tokens; log-probabilities differ by {max(furthest):.1e} at most")
