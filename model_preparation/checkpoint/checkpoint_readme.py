"""README.txt of a checkpoint folder: how to load it, in lines that run as they stand from within the folder."""

from typing import Any

from rich.filesize import decimal

from model_preparation.llamba.transformers_versions import TESTED

_TEXT = """\
{title}
{underline}

{summary}

Files
{files}
  tensor_digests.json   whose each tensor is, and its digest
  checkpoint_info.json  layers, sources, digests, config: also the recipe to build it again
{shared}
{needs} Run the lines below with
this folder as the current one; elsewhere, write the path before the file names.

{ways}
The model is on the CPU; model.cuda() moves it.
"""

_PT_FILES = """\
  model.pt              the whole model ({size}), ready to use
  model_state_dict.pt   its state dict
  tokenizer/            the tokenizer"""

_HF_FILES = """\
  *.safetensors         the weights ({size}), a file per layer
  *.json, tokenizer*    their index, the configs, the tokenizer: what transformers reads beside them
  *.py                  the model's code, for transformers without our package"""

_SHARED = """
The .safetensors files may be links to files that other checkpoints share: replace one if you must, but never write into
it.
"""

_NEEDS = "Loading needs the package `model_preparation` installed (pip install PATH_TO_THE_REPOSITORY)."
_HF_NEEDS = "Loading needs transformers, and for way 1 the package `model_preparation`."

_LOAD_CHECKPOINT = """\
Model and tokenizer at once; nothing is unpickled, and the weights are read as they are used:

    from model_preparation import load_checkpoint
    model, tokenizer = load_checkpoint(".")
    inputs = tokenizer("Hello world", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=20)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
"""

_PT_WAYS = [
    """\
The whole model; importing the package lets torch.load read it safely:

    import model_preparation
    import torch
    from transformers import AutoTokenizer
    model = torch.load("model.pt")
    tokenizer = AutoTokenizer.from_pretrained("tokenizer")

   Without that import, on a file you trust, torch.load("model.pt", weights_only=False) does the same:

    import torch
    model = torch.load("model.pt", weights_only=False)
""",
    """\
The state dict, into the architecture that checkpoint_info.json describes:

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

_HF_WAYS = [
    f"""\
transformers alone, without our package. It runs the .py files of this folder: read them, or trust who made it.
They were tested with {TESTED}.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)

   lm-eval in the same way:  lm_eval --model hf --model_args pretrained=.,trust_remote_code=True --tasks mmlu
"""
]


def readme_text(info: dict[str, Any]) -> str:
    """README.txt for a checkpoint; it depends on the recipe alone, not on the folder's name nor on later scores.

    Args:
        info: its checkpoint_info.json, as far as it is known when this file is written.
    """
    layers = ", ".join(map(str, info["replaced_layers"]))
    title = f"{info['base_model']['id']} with layers {layers} of {info['replacement_source']['id']}"
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
        ways += _HF_WAYS
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
