"""The text of a checkpoint's README.txt: what the checkpoint is, its files, and how to load it."""

from typing import Any

from rich.filesize import decimal

from model_preparation.checkpoint.checkpoint_info import head_spec, is_healed
from model_preparation.hub.sources import donors_of

_TEXT = """\
{title}
{underline}

{summary}

Files
{files}
  tensor_digests.json   the origin and the digest of each tensor
  checkpoint_info.json  layers, sources, digests, config: the recipe to build the checkpoint again
{shared}
{needs} Run the
lines below in this folder. To run them elsewhere, write the path of this folder instead of "." and before file names.

{ways}
The model is on the CPU; model.cuda() moves it to a GPU.
"""

_PT_FILES = """\
  model.pt              the whole model ({size}), ready to use
  model_state_dict.pt   its state dict
  tokenizer/            the tokenizer"""

_HF_FILES = """\
  *.safetensors         the weights ({size}), a file per layer
  *.json, tokenizer*    the index of the weights, the configs, the tokenizer
  *.py                  the model's code, for transformers without our package"""

_SHARED = """
Other checkpoints may have links to the same .safetensors files. To change a file, replace it; never write into it.
"""

_NEEDS = "Loading needs the package `model_preparation` installed (pip install PATH_TO_THE_REPOSITORY)."
_HF_NEEDS = "Loading needs transformers, and for way 1 the package `model_preparation`."

_LOAD_CHECKPOINT = """\
Load model and tokenizer with one call. No code is unpickled, and weights are read when they are used:

    from model_preparation import load_checkpoint
    model, tokenizer = load_checkpoint(".")
    inputs = tokenizer("Hello world", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
"""

_PT_WAYS = [
    """\
Load the whole model. If the package is imported, torch.load reads the file safely:

    import model_preparation
    import torch
    from transformers import AutoTokenizer
    model = torch.load("model.pt")
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")

   If you trust the file, this works without importing the package:

    import torch
    model = torch.load("model.pt", weights_only=False)
""",
    """\
Load the state dict into the architecture that checkpoint_info.json describes:

    import json
    import torch
    from transformers import AutoModelForCausalLM
    from model_preparation import LlambaConfig
    with open("checkpoint_info.json", encoding="utf-8") as file:
        config = LlambaConfig.from_dict(json.load(file)["config"])
    model = AutoModelForCausalLM.from_config(config).eval()
    model.load_state_dict(torch.load("model_state_dict.pt"), strict=True)
""",
]

_HF_WAY = """\
Load the model with transformers, without our package. This runs the .py files of this folder: read them first,
unless you trust their author. They were tested with {tested}.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)

   lm-eval loads it in the same way:  lm_eval --model hf --model_args pretrained=.,trust_remote_code=True --tasks mmlu
"""


def readme_text(info: dict[str, Any]) -> str:
    """The text of README.txt. The text depends only on the recipe, not on the folder's name or later scores.

    Args:
        info: checkpoint_info.json, which need not be complete yet.
    """
    from model_preparation.llamba.transformers_versions import TESTED  # imports transformers

    grafted = [f"layers {', '.join(map(str, info['replaced_layers']))}"] if info["replaced_layers"] else []
    grafted += [f"heads {heads} (layer:heads)"] if (heads := head_spec(info)) else []
    donors = " and ".join(donor["id"] for donor in donors_of(info))
    title = f"{info['base_model']['id']} with {' and '.join(grafted)} of {donors}"
    summary = [
        f"{info['num_replaced_layers']} of {info['total_layers']} layers are replaced; weights in {info['dtype']}. "
        "Scores are in checkpoint_info.json.",
    ]
    if "healing" in info:
        healing = info["healing"]
        title += ", healed"
        summary.append(
            f"Healed from {info['parent']['id']} by method {healing['method']}, {healing['steps']} steps; "
            f"held-out loss {_loss(healing['scores']['before'])} before, {_loss(healing['scores']['after'])} after."
        )
    elif is_healed(info):
        summary.append(f"Built on {info['descent'][-1]['from']['id']}, which is healed or has a healed ancestor.")
    if info["description"]:
        summary.insert(0, info["description"])
    has_pt, has_hf = info["format"] != "hf", info["format"] != "pt"
    files, ways = [], [_LOAD_CHECKPOINT]
    if has_pt:
        files.append(_PT_FILES.format(size=decimal(info["files"]["model.pt"]["bytes"])))
        ways += _PT_WAYS
    if has_hf:
        shards = [entry["bytes"] for name, entry in info["files"].items() if name.endswith(".safetensors")]
        files.append(_HF_FILES.format(size=decimal(sum(shards))))
        ways.append(_HF_WAY.format(tested=TESTED))
    return _TEXT.format(
        title=title,
        underline="=" * len(title),
        summary="\n".join(summary),
        files="\n".join(files),
        shared=_SHARED if has_hf else "",
        needs=_NEEDS if has_pt else _HF_NEEDS,
        ways="\n".join(f"{number}. {way}" for number, way in enumerate(ways, start=1)),
    )


def _loss(scores: dict[str, Any]) -> str:
    return "unknown" if scores["eval_loss"] is None else f"{scores['eval_loss']:.4f}"
