"""A model for lm-eval that answers through an OpenAI API, such as the one of `layer-surgery serve`.

lm-eval's own client builds the requests and reads the answers. This file sends the requests. It also tokenizes the
texts, in the same way as for a model that lm-eval loads itself: the client would leave out the special token at the
beginning.
"""

import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import requests
from lm_eval.api.instance import Instance
from lm_eval.models import api_models
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.results_folder import ResultsFolder
from model_preparation.io.result_inputs import digest_of
from model_preparation.io.untrusted.untrusted_files import check_fields
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer

_ADDRESS = "such as http://127.0.0.1:8000"
_TIMEOUT_SECONDS = 3600  # a CPU takes minutes for many long prompts
_AUTO_PROMPTS = 32  # prompts per request, if the batch size is "auto"
_MAX_LENGTH = 2048  # tokens, if a server does not give its limit; this is lm-eval's own default
_PROBE = "Ada likes jam. In 1837, 22/7 was near enough; naïve café, 你好!\n\tdef f(x): return x ** 2"
_ROUNDING = 0.05  # because of rounding, log-probabilities of the same model may differ by this much
_NUMBER = (float, int, type(None))
_MODELS = {"data": [{"id": str, "root?": (str, type(None)), "max_model_len?": (int, type(None))}]}
_TEXTS = {"choices": [{"index": int, "text": (str,)}]}
_SCORES = {"choices": [{"index": int, "logprobs": {"token_logprobs": [_NUMBER], "top_logprobs": list}}]}


class Server(NamedTuple):
    """A model that a server has.

    Attributes:
        url: the address of the API; it ends in /v1.
        about: the server's facts about the model: its name, the folder that it was loaded from, its longest sequence.
    """

    url: str
    about: Mapping[str, Any]

    @classmethod
    def find(cls, url: str, name: str | None = None) -> "Server":
        """Ask a server for its models, and choose one.

        Raises:
            SurgeryError: if no server answers; if the server has no model, or none that is called `name`; or if it has
                several models and `name` is None.
        """
        url = url.rstrip("/").removesuffix("/completions").removesuffix("/v1") + "/v1"
        models = {each["id"]: each for each in _ask(url, "models", _MODELS)["data"]}
        if not models:
            raise SurgeryError(f"The server at {url} has no model. Start it with one, or give another --server.")
        if name is None and len(models) == 1:
            name = next(iter(models))
        if name not in models:
            fault = "several models" if name is None else f"no model {name!r}"
            raise SurgeryError(
                f"The server at {url} has {fault}. Name one of its models by --model: {', '.join(models)}."
            )
        known = {"model": name, "folder": models[name].get("root"), "max_length": models[name].get("max_model_len")}
        return cls(url, {field: value for field, value in known.items() if value is not None})

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request for completions, with its fields checked."""
        return _ask(self.url, "completions", _SCORES if body.get("echo") else _TEXTS, body)

    def check_same(self, tokenizer: PreTrainedTokenizerBase, results: ResultsFolder) -> None:
        """Compare the log-probabilities of a fixed text with the kept ones, to see whether the model is the same.

        The first time, there is nothing to compare with, and the new log-probabilities are kept.

        Raises:
            SurgeryError: if the model is another one, if the server gives no log-probabilities, or if the
                server and `tokenizer` make different numbers of tokens.
        """
        body = {"model": self.about["model"], "prompt": _PROBE, "max_tokens": 1, "temperature": 0}
        answer = self.complete({**body, "logprobs": 1, "echo": True})
        found = answer["choices"][0]["logprobs"]["token_logprobs"][:-1]  # the last one belongs to the new token
        if len(found) != len(tokenizer(_PROBE).input_ids):
            raise SurgeryError(
                f"The server at {self.url} makes {len(found)} tokens of a text, but the tokenizer in "
                f"{tokenizer.name_or_path} makes {len(tokenizer(_PROBE).input_ids)}. Name the tokenizer of the served "
                "model by --tokenizer, or this model by --checkpoint."
            )
        asked, kept = digest_of(body), results.read_record("server")
        if kept is None or kept["requests"] != asked:
            results.keep_record("server", {"requests": asked, "answers": found[1:]})
        elif max(abs(one - other) for one, other in zip(found[1:], kept["answers"], strict=True)) > _ROUNDING:
            raise SurgeryError(
                f"The model {self.about['model']} at {self.url} is not the one whose answers are in {results.folder}. "
                "Move that folder elsewhere, or name another --results_dir."
            )


def _ask(url: str, path: str, fields: Mapping[str, Any], body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Send a request to a server, and return the answer after a check of its fields."""
    key = os.environ.get("OPENAI_API_KEY")
    try:
        response = requests.request(
            "GET" if body is None else "POST",
            f"{url}/{path}",
            json=body,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=_TIMEOUT_SECONDS,
        )
    except (requests.RequestException, ValueError) as error:  # ValueError: the address is not a valid URL
        reason = getattr(error.args[0], "reason", error) if error.args else error  # requests wraps urllib3's error
        raise SurgeryError(
            f"No server answers at {url} ({reason}). Start one by layer-surgery serve, or give another --server, "
            f"{_ADDRESS}."
        ) from error
    if response.status_code == 401:
        raise SurgeryError(f"The server at {url} asks for a key. Put it into the environment variable OPENAI_API_KEY.")
    if not response.ok:
        said = " ".join(response.text.split())[:300]
        raise SurgeryError(
            f"The server at {url} refuses a request for {path}: HTTP status {response.status_code}, {said!r}. "
            f"Give a --server that takes such requests, {_ADDRESS}."
        )
    try:
        answer = response.json()
        check_fields({"answer": answer}, {"answer": fields})
    except ValueError as error:
        missing = "log-probabilities of prompts" if fields is _SCORES else f"{path} in the form of OpenAI's API"
        raise SurgeryError(
            f"The server at {url} does not give {missing} ({error}). Give another --server, such as one "
            "of vLLM or layer-surgery serve."
        ) from error
    return answer


class ServerLM(LocalCompletionsAPI):
    """The server's model, with the methods that lm-eval calls.

    Args:
        server: where the model is.
        tokenizer: the folder of the model's tokenizer.
        batch_size: prompts per request.
        seed: sent with each request.
        advance: called with the number of lm-eval's requests just answered.
    """

    truncated = 0  # never changes, because a server refuses prompts that are too long

    def __init__(
        self,
        server: Server,
        tokenizer: Path,
        batch_size: int | str = "auto",
        seed: int = 1234,
        advance: Callable[[int], None] = lambda count: None,
    ):
        super().__init__(
            model=server.about["model"],
            base_url=server.url,
            tokenizer_backend="huggingface",
            tokenizer=str(tokenizer),
            batch_size=_AUTO_PROMPTS if batch_size == "auto" else batch_size,
            max_length=server.about.get("max_length", _MAX_LENGTH),
            add_bos_token=None,  # the tokenizer decides
            seed=seed,
        )
        self.tokenizer = load_tokenizer(tokenizer)
        self._server = server
        self._advance = advance

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **kwargs) -> Any:
        """The tokens of a text, or of several, as lm-eval's Hugging Face model makes them."""
        if not isinstance(string, str):
            return [self.tok_encode(each, add_special_tokens, **kwargs) for each in string]
        return HFLM.tok_encode(self, string, add_special_tokens, **kwargs)

    def model_call(self, messages: Any, *, generate: bool = True, gen_kwargs: dict | None = None, **kwargs) -> dict:
        gen_kwargs = copy.deepcopy(gen_kwargs)  # _create_payload removes fields from it
        payload = self._create_payload(messages, generate, gen_kwargs, self._seed, self.eos_string, **kwargs)
        answer = self._server.complete(payload)
        self._advance(len(messages))
        return answer

    def _loglikelihood_tokens(self, requests: Any, **kwargs) -> list[tuple[float, bool]]:
        with _without_bar():
            return super()._loglikelihood_tokens(requests, **kwargs)

    def texts(self, requests: Sequence[Instance]) -> Iterator[list[tuple[int, str]]]:
        """The same as `ScoringLM.texts`. A batch is one request to the server."""
        for start in range(0, len(requests), self._batch_size):
            with _without_bar():
                texts = super().generate_until(requests[start : start + self._batch_size])
            yield list(enumerate(texts, start))


def _without_bar() -> Any:
    """Hide lm-eval's progress bar within the block. lm-eval has no option for this."""
    return patch.object(api_models, "tqdm", partial(tqdm, disable=True))
