"""serve_checkpoint.py where vLLM is not installed: the same API, answered by `generate`; and what it refuses."""

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_preparation import SurgeryError, evaluate_checkpoint
from model_preparation.checkpoint.load import load_checkpoint
from model_preparation.io.complete_file import write_file
from model_preparation.io.self_checksum import with_checksum
from model_preparation.serve.small_server import Answering, Refused, _Handler
from model_preparation.serve.vllm_versions import installed_vllm
from tests.conftest import assert_refused, run_command
from tests.serve.conftest import SCORED, assert_scores_are_ours

TEMPLATE = """\
{% if messages[0].role == "tool" %}{{ raise_exception("no tools here") }}{% endif %}\
{{ bos_token }}{% for message in messages %}{{ message.content }} {% endfor %}"""


@pytest.fixture(scope="module")
def server(serve, served_dirs, quick_children, tmp_path_factory):
    """A graft whose tokenizer has a chat template, which the embedded pair's has not."""
    checkpoint = shutil.copytree(served_dirs["pt"], tmp_path_factory.mktemp("chats") / "graft")
    (checkpoint / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    return serve(checkpoint, "--engine", "transformers", "--api_key", "secret")


@pytest.fixture(scope="module")
def model(served_dirs):
    return load_checkpoint(served_dirs["pt"])[0]


@pytest.fixture(scope="module")
def answering(served_dirs) -> Answering:
    return Answering(*load_checkpoint(served_dirs["pt"]), "graft")


def send(server, path: str, body: dict | bytes | None = None, key: str = "secret") -> tuple[int, str]:
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def complete(server, **body) -> dict:
    status, answer = send(server, "/v1/completions", {"model": "graft", "temperature": 0, **body})
    assert status == 200, answer
    return json.loads(answer)


PROMPT = [1, 6, 5, 38, 4, 7, 5, 48, 4, 6, 5]  # Ada likes jam . Ben likes tea . Ada likes


def test_greedy_tokens_and_log_probabilities(server, model):
    answer = complete(server, prompt=PROMPT, max_tokens=5, logprobs=1, echo=True)
    ours = model.generate(torch.tensor([PROMPT]), max_new_tokens=5, do_sample=False)[0]
    logprobs = model(ours[None]).logits[0, :-1].log_softmax(-1).gather(1, ours[1:, None])[:, 0]
    described = answer["choices"][0]["logprobs"]
    assert described["token_logprobs"][0] is None
    torch.testing.assert_close(torch.tensor(described["token_logprobs"][1:]), logprobs, rtol=0, atol=1e-4)
    assert len(described["tokens"]) == len(described["top_logprobs"]) == len(ours)
    assert answer["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": len(ours) - len(PROMPT),
        "total_tokens": len(ours),
    }


def test_chat_goes_through_the_template_with_one_bos(server):
    text = "Ada likes jam . Ben likes tea . Ada likes"
    body = {"model": "graft", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 3}
    answer = json.loads(send(server, "/v1/chat/completions", body)[1])
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    message = answer["choices"][0]["message"]
    assert (message["role"], message["content"]) == (
        "assistant",
        complete(server, prompt=PROMPT, max_tokens=3)["choices"][0]["text"],
    )
    pieces = send(server, "/v1/chat/completions", {**body, "stream": True})[1].split("\n\n")[:-2]
    deltas = [json.loads(piece.removeprefix("data: "))["choices"][0]["delta"]["content"] for piece in pieces]
    assert "".join(deltas) == message["content"]


def test_several_prompts_and_answers_stop_words_and_streaming(server):
    text = "Ada likes jam . Ben likes tea . Ada likes"
    whole = complete(server, prompt=[text, "Ben"], max_tokens=8)["choices"]
    assert [choice["index"] for choice in whole] == [0, 1]
    words = whole[0]["text"].split()
    drawn = complete(server, prompt=text, max_tokens=8, n=2, temperature=1.5, seed=1)["choices"]
    assert drawn[0]["text"] != drawn[1]["text"]
    assert drawn == complete(server, prompt=text, max_tokens=8, n=2, temperature=1.5, seed=1)["choices"]
    stopped = complete(server, prompt=text, max_tokens=8, stop=words[2])["choices"][0]
    assert (stopped["text"].split(), stopped["finish_reason"]) == (words[:2], "stop")
    for stop, shown in (([], words), ([words[2]], words[:2])):
        body = {"model": "graft", "prompt": text, "temperature": 0, "max_tokens": 8, "stream": True, "stop": stop}
        lines = send(server, "/v1/completions", body)[1].split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-2]]
        assert "".join(pieces).split() == shown


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/completions", {"prompt": "Ada", "best_of": 3}, 400, "best_of"),
        ("/v1/completions", {"prompt": [[1, 99]]}, 400, "between 0 and 53"),
        ("/v1/completions", {"prompt": "Ada", "max_tokens": 600}, 400, "512"),
        ("/v1/completions", {"prompt": "Ada", "temperature": "hot"}, 400, "temperature"),
        ("/v1/completions", {"prompt": "Ada", "model": "other"}, 404, "other"),
        ("/v1/completions", {}, 400, "prompt is missing"),
        ("/v1/completions", b"[", 400, "JSON"),
        ("/v1/completions", b'{"prompt": "\\ud800"}', 400, "half of a surrogate pair"),
        ("/v1/chat/completions", {"messages": [{"role": "tool", "content": "Ada"}]}, 400, "no tools here"),
        ("/v1/embeddings", {}, 404, "embeddings"),
    ],
)
def test_what_is_refused(server, path, body, status, words):
    found, answer = send(server, path, body)
    assert (found, words in json.loads(answer)["error"]["message"]) == (status, True), answer


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    prompt=st.text(st.characters(codec="utf-8"), min_size=1, max_size=6)
    | st.lists(st.integers(0, 53), min_size=1, max_size=4),
    temperature=st.sampled_from([0, 1, 5e-324, 1e-46, 1e-6, 1e-5, 1e38, 1e300]) | st.floats(0, 2),
    top_p=st.sampled_from([0, 1e-300, 0.5, 1]),
    seed=st.none() | st.integers(),
    logprobs=st.none() | st.integers(0, 20),
    n=st.integers(1, 2),
    echo=st.booleans(),
)
def test_any_request_that_is_not_refused_gets_text(answering, **fields):
    with contextlib.suppress(Refused):  # a prompt may have no tokens
        answer = answering.complete({**fields, "max_tokens": 2}, lambda _: None)
        assert len(answer["choices"]) == fields["n"]
        json.dumps(answer, allow_nan=False)


def test_a_failure_of_the_server_is_an_answer_too(answering, monkeypatch, capfd):
    def fail(*_, **__):
        raise RuntimeError("too little memory")

    monkeypatch.setattr(answering._model, "generate", fail)
    handler = type("Handler", (_Handler,), {"answers": answering, "key": None})
    with HTTPServer(("127.0.0.1", 0), handler) as http:
        http.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.handle_request)
        thread.start()
        status, answer = send(http, "/v1/completions", {"prompt": "Ada"})
        thread.join()
    assert (status, json.loads(answer)["error"]["message"]) == (500, "The server failed: too little memory")
    assert "RuntimeError: too little memory" in capfd.readouterr().err


def test_the_key_is_needed_and_health_needs_none(server):
    assert send(server, "/v1/models", key="wrong")[0] == 401
    assert send(server, "/health", key="wrong")[0] == 200
    status, answer = send(server, "/v1/models")
    assert (status, json.loads(answer)["data"][0]["id"]) == (200, "graft")


def test_a_tokenizer_without_a_chat_template_is_named(model, served_dirs):
    answering = Answering(model, load_checkpoint(served_dirs["pt"])[1], "graft")
    with pytest.raises(Refused, match=r"has no chat template\. Send a prompt to /v1/completions"):
        answering.chat({"messages": [{"role": "user", "content": "Hi"}]}, print)


def test_a_client_that_goes_away_does_no_harm(server):
    port = int(server.url.rpartition(":")[2])
    body = json.dumps({"prompt": PROMPT, "max_tokens": 400, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.0\r\nAuthorization: Bearer secret\r\n")
        client.sendall(f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        client.recv(100)
    assert complete(server, prompt=PROMPT, max_tokens=1)["choices"]


def test_a_task_is_scored_through_the_server(server, served_dirs, tmp_path, monkeypatch):
    folder = assert_scores_are_ours(served_dirs["pt"], server, tmp_path / "results", OPENAI_API_KEY="secret")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def again(**changes) -> dict:
        settings = {**SCORED, "server": server.url, "results_dir": tmp_path / "results"}
        return evaluate_checkpoint(served_dirs["pt"], **{**settings, **changes})

    result = again()
    assert (result["kept"], result["results_dir"]) == (True, str(folder))
    assert result["settings"]["server"] == {"model": "graft", "max_length": 512}
    assert json.loads((served_dirs["pt"] / "checkpoint_info.json").read_text())["mmlu_score"] is None
    record = json.loads((folder / "answers" / "server.json").read_text())
    record["answers"][3] += 0.1
    write_file(folder / "answers" / "server.json", with_checksum(record))
    with pytest.raises(SurgeryError, match="is not the one whose answers are in"):
        again()
    with pytest.raises(SurgeryError, match=r"no model 'other'.*--model: graft"):
        again(model="other")
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(SurgeryError, match="OPENAI_API_KEY"):
        again()


def test_servers_that_cannot_score(served_dirs, tmp_path):
    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer({"data": [{"id": name} for name in names]})

        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.answer({"choices": [{"index": 0, "text": " Ada", "logprobs": None}]})

        def answer(self, content):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

    names = ["a"]
    flags = ("--checkpoint", served_dirs["pt"], "--tasks", "embedded_recall", "--results_dir", tmp_path)
    with HTTPServer(("127.0.0.1", 0), Answers) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}/v1"
        assert_refused(run_command("test_checkpoint", *flags, "--server", url), "give log-probabilities", "--server")
        names[:] = ["a", "b"]
        assert_refused(run_command("test_checkpoint", *flags, "--server", url), "several models. ", "--model: a, b.")
        names.clear()
        assert_refused(run_command("test_checkpoint", *flags, "--server", url), "has no model. Start it with one")
        http.shutdown()
    assert_refused(run_command("test_checkpoint", *flags, "--server", url), url, "refused", "--server")
    assert_refused(run_command("test_checkpoint", "--server", url), "--tokenizer", "--results_dir", code=2)
    assert_refused(run_command("test_checkpoint", *flags, "--model", "a"), "--server", code=2)
    written = run_command("test_checkpoint", *flags, "--server", url, "--prompt", "Ada likes")
    assert_refused(written, "--prompt has no effect with --server", code=2)
    measured = run_command("test_checkpoint", *flags, "--server", url, "--efficiency")
    assert_refused(measured, "--efficiency measures on this machine", "leave out --server", code=2)


def test_ctrl_c_ends_it(server):
    """The last test of this server."""
    said = server.said.read_text()
    assert "Address      http://127.0.0.1:" in said
    assert "curl http://127.0.0.1:" in said
    assert server.end(signal.SIGINT) == 0
    said = server.said.read_text()
    assert "\nStopped.\n" in said  # where vLLM is installed, libraries may print more as they end
    assert "Traceback" not in said
    assert "error" not in said


def test_bad_input(served_dirs, tmp_path):
    graft = served_dirs["pt"]
    assert_refused(run_command("serve_checkpoint", "--checkpoint", tmp_path), "empty folder")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = run_command("serve_checkpoint", "--checkpoint", graft, "--engine", "transformers", "--port", port)
    assert_refused(result, port, "--port")
    result = run_command("serve_checkpoint", "--checkpoint", graft, "--engine", "transformers", "--host", "nowhere.x")
    assert_refused(result, "nowhere.x")
    assert_refused(run_command("serve_checkpoint", "--checkpoint", graft, "--port", 70000), "70000", code=2)


def test_a_damaged_checkpoint_is_found_by_verify(served_dirs, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in served_dirs["hf"].iterdir():
        os.link(path, damaged / path.name)
    shard = damaged / "layer_03.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.unlink()
    shard.write_bytes(data)
    result = run_command("serve_checkpoint", "--checkpoint", damaged, "--engine", "transformers", "--verify")
    assert_refused(result, "layer_03.safetensors")


@pytest.mark.parametrize(("version", "words"), [(None, "not installed"), ("0.30.1", "0.30.1"), ("0.34.0", "0.34.0")])
def test_a_missing_or_other_vllm(served_dirs, tmp_path, version, words):
    """Only vLLM's metadata is faked: our code asks it which version is installed."""
    if version is None and installed_vllm() is not None:
        pytest.skip("vLLM is installed")
    if version is not None:
        info = tmp_path / f"vllm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    result = run_with_path(tmp_path, "--checkpoint", served_dirs["pt"], "--engine", "vllm")
    assert_refused(result, words, "pip install", "--engine transformers")


def run_with_path(folder, *args):
    from tests.conftest import run_fresh_command

    return run_fresh_command("serve_checkpoint", *args, PYTHONPATH=str(folder))


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
            "  Value error, User-specified max_model_len (9) is too great [type=value_error, input_type=A]\n",
            "User-specified max_model_len (9) is too great.",
        ),
        (
            "(APIServer pid=7) WARNING [system.py:1] This can cause errors like `OSError: Too many open files`\n"
            "(EngineCore pid=9) ERROR 11-30 08:04:11 [core.py:1510] ValueError: No available memory for the cache.\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n",
            "No available memory for the cache.",
        ),
        (
            "usage: api_server.py [--log-error-stack]\napi_server.py: error: unrecognized arguments: --nonsense\n",
            "unrecognized arguments: --nonsense.",
        ),
        ("Killed\n", "Killed."),
        ("", "it printed nothing."),
    ],
)
def test_the_reason_in_the_log_of_vllm(tmp_path, log, reason):
    """The logs are shortened ones of vLLM 0.32."""
    from model_preparation.serve.vllm_process import reason_in

    (tmp_path / "log").write_text(log)
    assert reason_in(tmp_path / "log") == reason
