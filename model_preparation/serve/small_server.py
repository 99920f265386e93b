"""A small server for machines without vLLM: OpenAI's completions and chat, one request after the other.

`transformers serve` is not enough: it takes only models whose class is in transformers itself, and it has neither
log-probabilities nor an API key. This server uses only Python's own HTTP server and `generate`.
"""

import hmac
import json
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList, set_seed
from transformers.generation.streamers import BaseStreamer

from model_preparation.checkpoint.load import load_checkpoint
from model_preparation.errors import SurgeryError, one_line
from model_preparation.io.untrusted.untrusted_tokenizer import apply_chat_template

Emit = Callable[[dict[str, Any]], None]

_MAX_BODY_BYTES = 32_000_000
_SILENCE_SECONDS = 60  # then a silent client, which blocks all others, is dropped
_LEAST_TEMPERATURE = 1e-5  # below it, as in vLLM, the answer is greedy: divided logits could be infinite
_NUMBER = (int, float)
# The fields of a request: (types, default). Other fields are refused, so that nobody thinks they work.
_COMMON: dict[str, tuple[tuple[type, ...], Any]] = {
    "model": ((str,), None),
    "max_tokens": ((int,), 16),
    "temperature": (_NUMBER, 1.0),
    "top_p": (_NUMBER, 1.0),
    "n": ((int,), 1),
    "stop": ((str, list), None),
    "seed": ((int,), None),
    "stream": ((bool,), False),
    "user": ((str,), None),  # accepted and not used; OpenAI has it for its own records
}
_COMPLETION = {**_COMMON, "prompt": ((str, list), None), "logprobs": ((int,), None), "echo": ((bool,), False)}
_CHAT = {**_COMMON, "messages": ((list,), None), "max_completion_tokens": ((int,), None)}


class Refused(Exception):
    """A client's mistake. The client gets the HTTP status and the sentence."""

    def __init__(self, sentence: str, status: int = 400):
        super().__init__(sentence)
        self.status = status


def serve_by_transformers(
    checkpoint: Path, *, name: str, host: str, port: int, dtype: str, api_key: str | None, ready: Callable[[], None]
) -> None:
    """Answer requests until this process gets SIGINT or SIGTERM. The arguments are as in `serve_by_vllm`."""
    model, tokenizer = load_checkpoint(checkpoint, dtype=dtype)
    answering = Answering(model, tokenizer, name)

    class Handler(_Handler):
        answers = answering
        key = api_key

    try:
        server = HTTPServer((host, port), Handler)
    except OSError as error:
        raise SurgeryError(f"Nothing can listen on {host}, port {port} ({error.strerror}).") from error
    with server:
        ready()
        server.serve_forever()


class Answering:
    """A model that answers requests in OpenAI's JSON."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str):
        self._model, self._tokenizer, self.name = model, tokenizer, name
        self.max_length = model.config.max_position_embeddings

    def complete(self, body: dict[str, Any], emit: Emit) -> dict[str, Any] | None:
        """The answer to a request for completions; None if the request asked for pieces (`stream`).

        Args:
            emit: called with each piece, as soon as its tokens are known.

        Raises:
            Refused: if the request is not valid.
        """
        request = self._read(body, _COMPLETION, "prompt")
        prompts = [self._ids(prompt) for prompt in _prompts_in(request["prompt"])]
        return self._answer(request, prompts, "text_completion", lambda text, piece: {"text": text}, emit)

    def chat(self, body: dict[str, Any], emit: Emit) -> dict[str, Any] | None:
        """As `complete`, for a request for the next message of a chat."""
        request = {**self._read(body, _CHAT, "messages"), "logprobs": None, "echo": False}
        if request["max_completion_tokens"] is not None:
            request["max_tokens"] = request["max_completion_tokens"]
        if self._tokenizer.chat_template is None:
            raise Refused("This checkpoint's tokenizer has no chat template. Send a prompt to /v1/completions instead.")
        try:
            text = apply_chat_template(self._tokenizer, request["messages"])
        except ValueError as error:
            raise Refused(f"The tokenizer's chat template makes no text of these messages: {error}.") from error
        prompt = self._tokenizer(text, add_special_tokens=False).input_ids  # the template has added the special tokens

        def message(text: str, piece: bool) -> dict[str, Any]:
            return {"delta" if piece else "message": {"role": "assistant", "content": text}}

        return self._answer(request, [prompt], "chat.completion", message, emit)

    def _read(self, body: dict[str, Any], known: dict[str, tuple[tuple[type, ...], Any]], needed: str) -> dict:
        given = {field: value for field, value in body.items() if value is not None}
        if unknown := sorted(set(given) - set(known)):
            raise Refused(f"The fields {', '.join(unknown)} are not known here. The known ones are {', '.join(known)}.")
        for field, value in given.items():
            kinds = known[field][0]
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise Refused(f"{field} is {value!r:.80}; it must be of type {wanted}.")
        request = {field: given.get(field, default) for field, (_, default) in known.items()}
        if request[needed] is None:
            raise Refused(f"{needed} is missing.")
        if request["model"] not in (None, self.name):
            raise Refused(f"There is no model {request['model']!r:.80} here, only {self.name}.", 404)
        limits = {"max_tokens": (0, inf), "n": (1, 128), "temperature": (0, inf), "top_p": (0, 1), "logprobs": (0, 20)}
        for field, (least, most) in limits.items():
            value = request.get(field)
            if value is not None and not least <= value <= most:
                at_most = "" if most == inf else f" and at most {most}"
                raise Refused(f"{field} is {value}; it must be at least {least}{at_most}.")
        if request["stream"] and request["n"] > 1:
            raise Refused("stream needs n = 1.")
        stop = request["stop"]
        request["stop"] = [stop] if isinstance(stop, str) else stop or []
        if not all(isinstance(word, str) and word for word in request["stop"]):
            raise Refused("stop must be a text or a list of texts.")
        return request

    def _ids(self, prompt: str | list[int]) -> list[int]:
        ids: list[int] = self._tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        vocabulary = self._model.config.vocab_size
        if not ids or not all(0 <= token < vocabulary for token in ids):
            raise Refused(f"A prompt has no tokens, or a token that is not between 0 and {vocabulary - 1}.")
        return ids

    def _answer(
        self, request: dict, prompts: list[list[int]], kind: str, part: Callable, emit: Emit
    ) -> dict[str, Any] | None:
        """Answer every prompt, as `complete`. `part(text, is_piece)` gives the fields of a choice with that text."""
        for prompt in prompts:
            if len(prompt) + request["max_tokens"] > self.max_length:
                raise Refused(
                    f"The prompt has {len(prompt)} tokens and max_tokens is {request['max_tokens']}; "
                    f"together they may be at most {self.max_length}."
                )
        if request["stream"] and (len(prompts) > 1 or request["echo"] or request["logprobs"] is not None):
            raise Refused("stream needs a single prompt, without echo and logprobs.")
        about = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if request["stream"]:

            def emit_text(text: str, reason: str | None = None) -> None:
                choice = {"index": 0, **part(text, True), "finish_reason": reason}
                emit({**about, "object": f"{kind}.chunk" if "chat" in kind else kind, "choices": [choice]})

            streamer = _Pieces(lambda ids: self._text(request, ids)[0], request["stop"], emit_text)
            ids, _ = self._generate(request, prompts[0], 0, streamer)
            streamer.send_rest(ids)
            emit_text("", self._text(request, ids)[1])
            return None
        choices: list[dict[str, Any]] = []
        new_tokens = 0
        for prompt in prompts:
            for number in range(request["n"]):
                ids, logits = self._generate(request, prompt, number)
                new_tokens += len(ids)
                text, reason = self._text(request, ids)
                if request["echo"]:
                    text = self._tokenizer.decode(prompt, skip_special_tokens=True) + text
                choice = {"index": len(choices), **part(text, False), "finish_reason": reason}
                if request["logprobs"] is not None:
                    choice["logprobs"] = self._logprobs(request, prompt, ids, logits)
                choices.append(choice)
        read = sum(map(len, prompts))
        usage = {"prompt_tokens": read, "completion_tokens": new_tokens, "total_tokens": read + new_tokens}
        return {**about, "object": kind, "choices": choices, "usage": usage}

    @torch.no_grad()
    def _generate(
        self, request: dict, prompt: list[int], number: int, streamer: "_Pieces | None" = None
    ) -> tuple[list[int], Tensor]:
        """The new tokens of the `number`-th answer, and the logits (tokens, vocabulary) from which they were chosen."""
        if request["max_tokens"] == 0:
            return [], torch.empty(0, self._model.config.vocab_size)
        settings: dict[str, Any] = {"do_sample": False}
        if request["temperature"] >= _LEAST_TEMPERATURE:
            settings = {"do_sample": True, "temperature": float(request["temperature"]), "top_k": 0}
            settings["top_p"] = float(request["top_p"])
            if request["seed"] is not None:
                set_seed((request["seed"] + number) % 2**32)  # numpy takes no other seeds

        def stops(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            # transformers' `stop_strings` fail with tokenizers that have only whole words.
            text = self._tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)
            return torch.tensor([any(word in text for word in request["stop"])], device=ids.device)

        ids = torch.tensor([prompt], device=self._model.device)
        out = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request["max_tokens"],
            output_logits=True,
            return_dict_in_generate=True,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stops]),
            **settings,
        )
        return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)

    def _text(self, request: dict, ids: list[int]) -> tuple[str, str]:
        """The answer up to a stop word, and why it ends: "stop" or "length"."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        ends = [text.index(word) for word in request["stop"] if word in text]
        if ends:
            return text[: min(ends)], "stop"
        eos = self._model.generation_config.eos_token_id
        ended = bool(ids) and ids[-1] in (eos if isinstance(eos, list) else [eos])
        return text, "stop" if ended else "length"

    @torch.no_grad()
    def _logprobs(self, request: dict, prompt: list[int], ids: list[int], logits: Tensor) -> dict[str, list]:
        """The tokens of an answer, described as OpenAI does. With `echo`, the prompt's tokens come first.

        The first token of the prompt has no probability.
        """
        tokens = ids
        if request["echo"]:
            tokens = prompt + ids
            before = self._model(torch.tensor([prompt], device=self._model.device)).logits[0, :-1]
            logits = torch.cat([before, logits.to(before)])
        logprobs = logits.float().log_softmax(-1)
        count = request["logprobs"]
        texts = [self._tokenizer.decode([token]) for token in tokens]
        described: dict[str, list] = {"tokens": texts, "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        if request["echo"]:
            described["token_logprobs"].append(None)
            described["top_logprobs"].append(None)
        for token, row in zip(tokens[len(tokens) - len(logprobs) :], logprobs, strict=True):
            best = row.topk(min(count, len(row)))
            top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            described["top_logprobs"].append({self._tokenizer.decode([other]): value for other, value in top})
            described["token_logprobs"].append(row[token].item())
        place = 0
        for text in texts:
            described["text_offset"].append(place)
            place += len(text)
        return described


class _Pieces(BaseStreamer):
    """Sends an answer in pieces while `generate` writes it."""

    def __init__(self, text: Callable[[list[int]], str], stop: list[str], emit: Callable[[str], None]):
        self._text, self._emit = text, emit
        # This number of characters at the end is held back, because they may begin a stop word.
        self._held_back = max((len(word) - 1 for word in stop), default=0)
        self._ids: list[int] | None = None  # None until `generate` has put the prompt
        self._sent = ""

    def put(self, value: Tensor) -> None:
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        text = self._text(self._ids)
        # U+FFFD at the end is half a character: the next token completes it.
        self._send(text[: max(len(self._sent), len(text) - self._held_back)].rstrip("\ufffd"))

    def end(self) -> None:
        """Send nothing when `generate` ends: `send_rest` then gets all tokens, and sends the rest of the text."""

    def send_rest(self, ids: list[int]) -> None:
        self._send(self._text(ids))

    def _send(self, text: str) -> None:
        if len(text) > len(self._sent):
            self._emit(text[len(self._sent) :])
            self._sent = text


def _prompts_in(given: str | list) -> list[str | list[int]]:
    """A request's prompts: one or several, as texts or as tokens."""
    if isinstance(given, str) or (given and _is_tokens(given)):
        return [given]
    if given and all(isinstance(prompt, str) or _is_tokens(prompt) for prompt in given):
        return given
    raise Refused("prompt must be a text, a list of texts, a list of tokens, or a list of lists of tokens.")


def _is_tokens(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)


class _Handler(BaseHTTPRequestHandler):
    answers: Answering
    key: str | None
    timeout = _SILENCE_SECONDS
    _streams = False  # whether the answer is sent in pieces, and the first was sent

    def do_GET(self) -> None:
        self._handle(self._get)

    def do_POST(self) -> None:
        self._handle(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing about requests."""

    def _get(self) -> None:
        if self.path == "/health":
            return self._send(200, {})
        self._check_key()
        if self.path != "/v1/models":
            raise Refused(f"There is no {self.path!r:.80} here.", 404)
        model = {"id": self.answers.name, "object": "model", "created": 0, "owned_by": "model_preparation"}
        model["max_model_len"] = self.answers.max_length  # vLLM has this field too
        return self._send(200, {"object": "list", "data": [model]})

    def _post(self) -> None:
        self._check_key()
        answer = {"/v1/completions": self.answers.complete, "/v1/chat/completions": self.answers.chat}.get(self.path)
        if answer is None:
            raise Refused(f"There is no {self.path!r:.80} here.", 404)

        def emit(piece: dict[str, Any]) -> None:
            if not self._streams:  # once status 200 is sent, this request cannot be refused
                self._streams = True
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
            self.wfile.write(f"data: {json.dumps(piece)}\n\n".encode())
            self.wfile.flush()

        whole = answer(self._body(), emit)
        if whole is None:
            self.wfile.write(b"data: [DONE]\n\n")
        else:
            self._send(200, whole)

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _MAX_BODY_BYTES:
            raise Refused(f"A request needs a Content-Length of at most {_MAX_BODY_BYTES:,} bytes.", 413)
        try:
            body = json.loads(self.rfile.read(int(length)))
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise Refused("The request has a text with half of a surrogate pair. Send whole characters.") from error
        except (ValueError, RecursionError) as error:
            raise Refused(f"The request is not JSON ({error}).") from error
        if not isinstance(body, dict):
            raise Refused("The request is not a JSON object.")
        return body

    def _check_key(self) -> None:
        given = self.headers.get("Authorization", "")
        if self.key is not None and not hmac.compare_digest(given.encode(), f"Bearer {self.key}".encode()):
            raise Refused("The key is missing or wrong. Send it as Authorization: Bearer KEY.", 401)

    def _handle(self, answer: Callable[[], None]) -> None:
        self._streams = False
        try:
            answer()
        except Refused as refused:
            self._send(refused.status, {"error": {"message": str(refused), "type": "invalid_request_error"}})
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the client went away, or was silent
        except Exception as error:  # such as too little memory for a long prompt
            if not self._streams:
                self._send(500, {"error": {"message": f"The server failed: {one_line(error)}", "type": "server_error"}})
            raise  # prints the traceback

    def _send(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
