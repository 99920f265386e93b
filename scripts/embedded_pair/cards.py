"""The cards of the embedded pair: what each model is, how it was made, its scores.

A card is the README.md in a model's folder, as hubs show it.
"""

from pathlib import Path
from typing import Any

from embedded_pair import donor
from embedded_pair.effect import summary
from model_preparation.embedded.recall import NAMES, THINGS, WORDS
from model_preparation.io.complete_file import write_file

_HEAD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# {name}

{what}

Both models of the pair have {layers} layers of width {width} and {words} words: {names} names, {things} things, and
the few words that say who likes what (`Ada likes plums .`). They can do nothing else, and are small enough for a
package. Grafting layers of `tiny_llama` into `tiny_llamba` takes seconds, and shows what a graft can do.

## How it was made

{made}

`{command}` in the repository makes both again, on two CPU cores.

## Scores

`embedded_recall`, {questions:,} questions: a text says what each of {people} people likes, and the model must say what
one of them likes. The training texts never had this person with this thing. Random guessing scores 0.25.

{scores}
"""
_DONOR = "A Llama that looks things up in its context: the donor of a pair that comes with `model_preparation`."
_DONOR_MADE = """\
Trained from nothing for {steps:,} steps of AdamW at {rate}. Each step has {batch} texts, with a loss where a text says
something again. It also has {batch} rows of names, or of things, in a random order that repeats after 4
to 20 words. Without these rows the model stays at chance for thousands of steps. Seed {seed}."""
_BASE = "A Llamba (Mamba-2) that cannot look things up well: the base of a pair that comes with `model_preparation`."
_BASE_MADE = """\
Distilled from `tiny_llama` layer by layer: each mixer, with a state of {state} columns per head, learns to give the
output of its layer's attention on the donor's own inputs (MOHAWK, arXiv 2408.10189, stage 2), for {steps} steps.
Embeddings, norms, MLPs and head are the donor's. No stage trains the whole model, so the base is called unaligned.
`distillation.json` has the losses."""


def write_cards(
    donor_dir: Path,
    base_dir: Path,
    effect: dict[str, Any],
    distilled: dict[str, Any],
    trained: dict[str, int],
    command: str,
) -> None:
    """Write both cards.

    Args:
        effect: what effect.json holds.
        distilled: the settings of the base's distillation: `steps_per_layer` and `d_state`.
        trained: the donor's seed, heads and steps.
        command: the command that makes both models again.
    """
    config = donor.config()
    common = {
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "words": len(WORDS),
        "names": len(NAMES),
        "things": len(THINGS),
        "people": donor.PEOPLE,
        "command": command,
        "questions": effect["questions"],
        "scores": summary(effect),
    }
    of_donor = _DONOR_MADE.format(**trained, rate=donor.LEARNING_RATE, batch=donor.BATCH)
    of_base = _BASE_MADE.format(steps=distilled["steps_per_layer"], state=distilled["d_state"])
    for folder, name, what, made in (
        (donor_dir, "tiny_llama", _DONOR, of_donor),
        (base_dir, "tiny_llamba", _BASE, of_base),
    ):
        write_file(folder / "README.md", _HEAD.format(name=name, what=what, made=made, **common))
