"""The card (README.md) of a shared checkpoint: recipe, scores, licence and how to load it.

The card is Markdown with YAML front matter that both hubs read. The same checkpoint_info.json gives the same text, so a
checkpoint that is shared again gets the same card.
"""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from model_preparation.checkpoint.checkpoint_info import head_spec, needs_parent
from model_preparation.errors import SurgeryError, one_line
from model_preparation.hub.download import TITLES
from model_preparation.hub.licences import LlamaTerms, terms_of
from model_preparation.hub.sources import donors_of, hub_target
from model_preparation.terminal import escaped

# The field with a measured score. If it is missing, a number in the field "mmlu_score" comes from the author.
MEASURED = "mmlu_result"
# Names on Hugging Face, by names on ModelScope, of models whose two names differ.
_ON_HUGGING_FACE = {
    "LLM-Research/Meta-Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "LLM-Research/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
}
_TAGS = ["llamba", "mamba2", "hybrid", "merge", "layer-surgery"]


def card_text(
    info: Mapping[str, Any], *, repo: str, hub: str, what: str, licence: str, revision: str | None = None
) -> str:
    """The card of a checkpoint.

    Args:
        info: the checkpoint's checkpoint_info.json.
        repo: org/name.
        hub: "modelscope" or "huggingface".
        what: the uploaded files: "pt", "hf", "both" or "recipe".
        licence: the id from `licences.licence_of`.
        revision: the branch, if it is not the hub's default branch.
    """
    terms = terms_of(info, licence)
    sections = [
        f"# {repo.partition('/')[2]}",
        *[f"**{built_with}**" for built_with in dict.fromkeys(term.built_with for term in terms)],
        *([_plain(info["description"])] if info["description"] else []),
        f"{_code(info['base_model']['id'])}, a Llamba (Mamba-2), in which {len(info['replaced_layers'])} of "
        f"{info['total_layers']} layers are replaced by layers with the same index, from "
        f"{' and '.join(_code(donor['id']) for donor in donors_of(info))}."
        + (f" Heads of the donor are added to other layers: {_code(head_spec(info))}." if head_spec(info) else ""),
        "## Loading it\n\n" + _loading(repo, hub, what, revision),
        "## Recipe\n\n" + _recipe(info),
        "## Scores\n\n" + _scores(info),
        "## Licence\n\n" + _licence(licence, terms),
    ]
    metadata = _metadata(info, repo=repo, hub=hub, what=what, licence=licence)
    card = ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")
    return str(card)


def read_card(text: str) -> str:
    """The licence id in the front matter of a card.

    Raises:
        SurgeryError: if the card has no front matter, or its front matter does not name one licence.
    """
    try:
        licence = ModelCard(text).data.get("license") if text.startswith("---") else None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise SurgeryError(
            f"The card's front matter cannot be read ({one_line(error)}). Correct the lines between its ---."
        ) from error
    if not isinstance(licence, str):
        raise SurgeryError(
            "The card names no licence. Begin it with a line ---, a line license: ID, and another line ---."
        )
    return licence


def _metadata(info: Mapping[str, Any], *, repo: str, hub: str, what: str, licence: str) -> ModelCardData:
    sources = [source["id"] for source in (info["base_model"], *donors_of(info)) if source["hub"] in TITLES]
    if hub == "huggingface":
        sources = [_ON_HUGGING_FACE.get(source, source) for source in sources]
    extra: dict[str, Any] = {"base_model_relation": "merge"} if sources else {}
    if hub == "modelscope":  # ModelScope has its own fields for task and framework
        extra |= {"tasks": ["text-generation"], "frameworks": ["pytorch"]}
    result = _eval_result(info)
    return ModelCardData(
        license=licence,
        base_model=list(dict.fromkeys(sources)) or None,
        # With .pt files alone, the hub would show code for transformers that does not run.
        library_name="transformers" if what in ("hf", "both") else None,
        pipeline_tag="text-generation",
        tags=_TAGS,
        model_name=repo.partition("/")[2] if result else None,
        eval_results=[result] if result else None,
        **extra,
    )


def _eval_result(info: Mapping[str, Any]) -> EvalResult | None:
    measured = info.get(MEASURED)
    if not measured:
        return None
    settings = measured["settings"]
    limit = settings["limit"]
    return EvalResult(
        task_type="text-generation",
        dataset_type="cais/mmlu",
        dataset_name="MMLU" + (f" (first {limit} questions of each subject)" if limit else ""),
        dataset_config="all",
        dataset_split="test",
        dataset_args={"num_few_shot": settings["num_fewshot"]},
        metric_type="accuracy",
        metric_value=measured["score"],
    )


def _loading(repo: str, hub: str, what: str, revision: str | None) -> str:
    library = {"modelscope": "modelscope", "huggingface": "huggingface_hub"}[hub]
    auto_classes = {"modelscope": "modelscope", "huggingface": "transformers"}[hub]
    place = f'"{repo}"' + (f", revision={json.dumps(revision)}" if revision else "")
    ways = []
    if what in ("hf", "both"):
        ways.append(
            "The modelling code comes with the weights, so only transformers must be installed. `README.txt` names the "
            "tested versions. Read the code before you trust it.\n\n"
            "```python\n"
            f"from {auto_classes} import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({place}, trust_remote_code=True)\n"
            f"tokenizer = AutoTokenizer.from_pretrained({place}, trust_remote_code=True)\n"
            "```"
        )
    if what in ("pt", "both"):
        ways.append(
            "With the package `model_preparation`, which unpickles no code:\n\n"
            "```python\n"
            f"from {library} import snapshot_download\n"
            "from model_preparation import load_checkpoint\n\n"
            f"model, tokenizer = load_checkpoint(snapshot_download({place}))\n"
            "```"
        )
    if what == "recipe":
        ways.append(
            "This is the recipe without the weights. The section Recipe says how to build the same bytes again."
        )
    return "\n\n".join(ways)


def _recipe(info: Mapping[str, Any]) -> str:
    base, donors = info["base_model"], donors_of(info)
    layers = " ".join(map(str, info["replaced_layers"]))
    names = ["donor", *(f"donor{number}" for number in range(2, len(donors) + 1))]
    versions = ", ".join(f"{name} {text}" for name, text in info["versions"].items())
    rows = [
        ("layers replaced, counted from 0", layers or "none"),
        *([("heads added, layer:heads", head_spec(info))] if head_spec(info) else []),
        ("base", _origin(base)),
        *(("donor", _origin(donor)) for donor in donors),
        ("parameters", f"{info['parameters']:,}"),
        ("dtype", info["dtype"]),
        ("attention in the donor's layers", f"{info['num_heads']} heads of width {info['head_dim']}"),
        ("made", _plain(f"{info['creation_time']}, {versions}")),
    ]
    digests = [
        (f"base, {_code(name)}", f"{title} {_code(entry[key])}")
        for name, entry in base["files"].items()
        for key, title in (("sha256", "SHA-256"), ("blake3", "BLAKE3"))
        if key in entry
    ]
    digests += [
        (f"donor, layer {index}", f"SHA-256 {_code(digest)}")
        for donor in donors
        for index, digest in donor["layers"].items()
    ]
    if needs_parent(info):
        return "\n\n".join([_table(("", ""), rows + _healing_rows(info)), _table(("file", "digest"), digests)])
    where = f" --base {_spec(base)}" if base["hub"] == "local" else ""
    return "\n\n".join(
        [
            _table(("", ""), rows),
            "These are the digests of the inputs: the base's files and the donor's extracted layers. The outputs' "
            "digests are in `checkpoint_info.json`.",
            _table(("file", "digest"), digests),
            "`checkpoint_info.json` is the whole recipe. With `model_preparation`, the same base and the same donor, "
            "it gives the same bytes. The last command checks this:",
            "```bash\n"
            + "".join(
                f"python extract_layers.py --model_name {_spec(donor)} --layers {' '.join(donor['layers'])} "
                f"--output_dir {name}_layers\n"
                for name, donor in zip(names, donors, strict=True)
            )
            + "python create_replaced_model_checkpoint.py --from_info checkpoint_info.json \\\n"
            f"    --llama_layers_dir {' '.join(f'{name}_layers' for name in names)}{where} --output_dir rebuilt\n"
            "```",
        ]
    )


def _healing_rows(info: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Table rows for a checkpoint that needs more than its recipe: how it was healed, or what it was built on."""
    if "healing" not in info:
        return [("built on", f"{_code(info['descent'][-1]['from']['id'])}; the recipe needs this checkpoint too")]
    healing = info["healing"]
    rows = [
        ("healed from", _code(info["parent"]["id"])),
        ("method", _plain(healing["method"])),
        ("steps", f"{healing['steps']:,}"),
    ]
    for when in ("before", "after"):
        if (loss := healing["scores"][when]["eval_loss"]) is not None:
            rows.append((f"held-out loss {when}, nats per token", f"{loss:.4f}"))
    return rows


def _scores(info: Mapping[str, Any]) -> str:
    measured = info.get(MEASURED)
    if measured:
        stderr = "" if measured["stderr"] is None else f" ± {measured['stderr']:.4f}"
        settings = measured["settings"]
        limit = settings["limit"]
        asked = f"{measured['questions']:,}" + (f", the first {limit} of each subject" if limit else "")
        rows = [
            ("MMLU, accuracy", f"{measured['score']:.4f}{stderr}"),
            ("questions", asked),
            *(
                (name, _plain(settings[name]))
                for name in ("num_fewshot", "dtype", "device", "batch_size")
                if name in settings
            ),
            ("lm-eval", _plain(measured["lm_eval_version"])),
            *([("date", _plain(measured["date"]))] if "date" in measured else []),
        ]
        return "Measured with `test_checkpoint.py --full_eval`.\n\n" + _table(("", ""), rows)
    if info["mmlu_score"] is None:
        return "MMLU was not measured."
    return (
        f"MMLU {info['mmlu_score']:.4f}: the author gave this number when the checkpoint was built. This software did "
        "not measure it, and its settings are not known."
    )


def _licence(licence: str, terms: list[LlamaTerms]) -> str:
    if not terms:
        return f"{_code(licence)}. The base and the donor have licences of their own, which still bind their weights."
    lines = [f"{_code(licence)}. This model contains weights of Llama:"]
    lines += [f"- {term.built_with}, under the [{term.title}]({term.link}). {term.notice}" for term in terms]
    return "\n".join([lines[0], "", *lines[1:]])


def _origin(source: Mapping[str, Any]) -> str:
    if source["hub"] == "local":
        return f"{_code(source['id'])}, a local folder of the author"
    if source["hub"] == "embedded":
        return f"{_code(source['id'])}, which comes with `model_preparation`"
    return f"{_code(source['id'])} on {TITLES[source['hub']]}, revision {_code(source['revision'] or 'not recorded')}"


def _spec(source: Mapping[str, Any]) -> str:
    """How a command line names the source."""
    if source["hub"] == "local":
        return shlex.quote(f"/path/to/{source['id']}")
    return hub_target(source)


def _table(head: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    cells = ([" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (head, ("---", "---"), *rows))
    return "\n".join(f"| {left} | {right} |" for left, right in cells)


def _plain(text: Any) -> str:
    """The text in one line, escaped, so that Markdown shows it as plain text."""
    line = re.sub(r"([\\`<\[\]])", r"\\\1", escaped(" ".join(str(text).split())))
    return f"\\{line}" if re.match(r"[#>+*~=_-]", line) else line


def _code(text: str) -> str:
    """The text as a code span. Its fence has more backticks than any run in the text, so it cannot end early."""
    line = escaped(" ".join(text.split()))
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"
