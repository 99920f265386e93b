"""Finds the licence that a grafted model is under, and the duties of the person who shares the model.

Nothing is guessed: if a source is a local folder or is not in the table, the user must name the licence.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

from model_preparation.errors import SurgeryError
from model_preparation.hub.sources import donors_of

# Patterns of hub ids, and their licence. A Llamba contains embeddings and MLPs of its Llama. So the Llama's licence
# binds it too, even if its publisher grants more.
_LICENCES = [
    (r"(meta-llama|LLM-Research)/Meta-Llama-3-.+", "llama3"),
    (r"(meta-llama|LLM-Research)/(Meta-)?Llama-3\.1-.+", "llama3.1"),
    (r"(meta-llama|LLM-Research)/(Meta-)?Llama-3\.2-.+", "llama3.2"),
    (r"(meta-llama|LLM-Research)/(Meta-)?Llama-3\.3-.+", "llama3.3"),
    (r"(cartesia-ai|goombalab)/Llamba-8B.*", "llama3.1"),
    (r"cartesia-ai/Llamba-[13]B.*", "llama3.2"),
    (r"HuggingFaceTB/SmolLM2-.+", "apache-2.0"),
    (r"Qwen/Qwen3-[\d.]+B(-Base)?", "apache-2.0"),
    (r"Qwen/Qwen2\.5-(0\.5|1\.5|7|14|32)B(-Instruct)?", "apache-2.0"),  # 3B and 72B have other licences
    (r"(mistralai|LLM-Research)/Mistral-7B-(Instruct-)?v0\.[123]", "apache-2.0"),
]
_PERMISSIVE = {"apache-2.0", "mit", "bsd-3-clause", "bsd-2-clause", "cc0-1.0", "unlicense"}
# Licence ids that the hubs have and SPDX's list does not have.
_HUB_IDS = {"gemma", "llama2", "llama4", "openrail", "creativeml-openrail-m", "bigcode-openrail-m", "unknown", "other"}
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LlamaTerms:
    """What a Llama licence demands for a model with Llama's weights, in addition to a copy of the licence.

    `begins` is a pattern for the beginning of the model's name, and `beginning` is an example. A text file
    next to the weights must hold `notice`.
    """

    title: str
    built_with: str
    begins: str
    beginning: str
    link: str
    notice: str


def _llama(version: str, link: str) -> LlamaTerms:
    title = f"Llama {version} Community License"
    return LlamaTerms(
        title=title,
        built_with="Built with Llama",
        begins=r"llama",
        beginning="Llama",
        link=link,
        notice=f"Llama {version} is licensed under the {title}, Copyright © Meta Platforms, Inc. All Rights Reserved.",
    )


LLAMA_TERMS = {
    "llama3": LlamaTerms(
        title="Meta Llama 3 Community License",
        built_with="Built with Meta Llama 3",
        begins=r"llama[ ._-]?3",
        beginning="Llama-3",
        link="https://www.llama.com/llama3/license/",
        notice="Meta Llama 3 is licensed under the Meta Llama 3 Community License, "
        "Copyright © Meta Platforms, Inc. All Rights Reserved.",
    ),
    "llama3.1": _llama("3.1", "https://www.llama.com/llama3_1/license/"),
    "llama3.2": _llama("3.2", "https://www.llama.com/llama3_2/license/"),
    "llama3.3": _llama("3.3", "https://www.llama.com/llama3_3/license/"),
}


def known_licence(source: Mapping[str, Any]) -> str | None:
    """The licence id of a source (its `hub` and `id`); None for local folders and unknown ids."""
    if source["hub"] == "local":
        return None
    if source["hub"] == "embedded":  # this project made its weights
        return "apache-2.0"
    return next((licence for pattern, licence in _LICENCES if re.fullmatch(pattern, source["id"], re.IGNORECASE)), None)


def licence_of(info: Mapping[str, Any], given: str | None = None) -> str:
    """The licence id of a checkpoint.

    Args:
        info: the checkpoint's checkpoint_info.json, with its base and its donors.
        given: the id that the user names. If known sources demand licences, it must be one of these, or "other".

    Raises:
        SurgeryError: if no licence is given, and a source's licence is unknown or several licences are
            possible. Also if the given id is malformed, or contradicts the licence of a source.
    """
    first, *others = donors_of(info)
    sources = {"base": info["base_model"], "donor": first}
    sources |= {f"donor {number}": donor for number, donor in enumerate(others, start=2)}
    known = {role: known_licence(source) for role, source in sources.items()}
    demanded = {licence: role for role, licence in known.items() if licence and licence not in _PERMISSIVE}
    if given is not None:
        given = given.lower()
        if not _LICENCE_ID.fullmatch(given):
            raise SurgeryError(
                f"{given!r} is not a licence id. Write it as the hubs do, such as llama3.1 or apache-2.0."
            )
        if demanded and given not in (*demanded, "other"):
            licence, role = next(iter(demanded.items()))
            raise SurgeryError(
                f"The {role} {sources[role]['id']} is under {licence}, so this model cannot be under {given}. "
                f"Give --licence {licence}, or leave --licence out."
            )
        if not _is_known(given):
            logger.warning("%r is not in the lists of the hubs or SPDX. If it is misspelt, correct it.", given)
        return given
    for role, source in sources.items():
        if known[role] is None:
            what = (
                "came from a local folder"
                if source["hub"] == "local"
                else "has a licence that this program does not know"
            )
            raise SurgeryError(
                f"The {role} {source['id']} {what}, so you must name the licence of this model. "
                "Look at its publisher's page and give --licence ID, such as llama3.1 or apache-2.0."
            )
    candidates = sorted(demanded) or sorted({licence for licence in known.values() if licence})
    if len(candidates) > 1:
        listed = ", ".join(f"the {role} is under {licence}" for role, licence in known.items())
        raise SurgeryError(f"{listed[0].upper()}{listed[1:]}. Read all these licences, then give --licence ID.")
    return candidates[0]


def _is_known(licence: str) -> bool:
    try:
        return licence in {*LLAMA_TERMS, *_HUB_IDS} or bool(canonicalize_license_expression(licence))
    except InvalidLicenseExpression:
        return False


def terms_of(info: Mapping[str, Any], licence: str) -> list[LlamaTerms]:
    """The Llama terms that bind a checkpoint: those of its own licence, and of its sources' known licences."""
    ids = {licence, *map(known_licence, [info["base_model"], *donors_of(info)])}
    return [terms for name, terms in LLAMA_TERMS.items() if name in ids]


def check_name(repo: str, terms: list[LlamaTerms]) -> None:
    """Raise SurgeryError if the name in `repo` (org/name) lacks the beginning that `terms` demand."""
    owner, _, name = repo.partition("/")
    for term in terms:
        if not re.match(term.begins, name, re.IGNORECASE):
            raise SurgeryError(
                f"The {term.title} requires a name that begins with {term.beginning}, but {name} does not. "
                f"Give --repo {owner}/{term.beginning}-{name}."
            )
