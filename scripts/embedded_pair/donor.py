"""The donor of the embedded pair: a small Llama that learns to look things up in its context.

Half of each batch are texts of `recall.py`, and half are rows of repeated words. Without these rows, the model stays
at chance on the texts for thousands of steps. Every `SAVED_EVERY` steps, the training's state is written to the disk.
A run that continues from a state ends with the same weights.
"""

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from model_preparation.embedded import recall
from model_preparation.errors import SurgeryError
from model_preparation.io.complete_file import write_file
from model_preparation.io.complete_folder import new_folder

PEOPLE = 16  # in a text, at most
FEWEST_PEOPLE = 4
BATCH = 32  # texts per step, and as many rows of repeated words
REPEATED_LENGTH = 64
LEARNING_RATE = 1e-3
WARM_UP, COOL_DOWN = 50, 360  # steps
BETAS, WEIGHT_DECAY, MAX_GRADIENT_NORM = (0.9, 0.95), 0.01, 1.0
SAVED_EVERY = 100


def config(heads: int = 2) -> LlamaConfig:
    """The donor's shape: its layers have `heads` query heads, and as many key/value heads."""
    return LlamaConfig(
        vocab_size=len(recall.WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=12,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=recall.MAX_WORDS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.06,
        tie_word_embeddings=False,
        bos_token_id=recall.WORDS.index(recall.BOS),
        eos_token_id=recall.WORDS.index(recall.EOS),
        pad_token_id=recall.WORDS.index(recall.PAD),
    )


def train_donor(folder: Path, state_file: Path, *, seed: int, steps: int, progress: Progress, heads: int = 2) -> None:
    """Train the donor and write it, with its tokenizer, into `folder`, which appears whole or not at all.

    Args:
        state_file: the training's state is written here. If the file exists, the training continues from it.
        progress: shows steps, losses and the time left.

    Raises:
        SurgeryError: if the state is of another seed, number of steps or number of heads.
    """
    set_seed(seed)
    run = {"seed": seed, "steps": steps, "heads": heads}
    model = LlamaForCausalLM(config(heads))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(seed)
    done = _load(state_file, model, optimizer, generator, run)
    bar = progress.add_task("Training the donor", total=steps, completed=done)
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARM_UP, (steps - step) / min(COOL_DOWN, steps))
        people = int(torch.randint(FEWEST_PEOPLE, PEOPLE + 1, (), generator=generator))
        texts = _loss(model, *recall.training_texts(BATCH, people, 2 * people, generator))
        repeats = _loss(model, *recall.repeated_words(BATCH, REPEATED_LENGTH, generator))
        optimizer.zero_grad()
        (texts + repeats).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        title = f"Training the donor: loss {texts.item():.2f}, on repeated words {repeats.item():.2f}"
        progress.update(bar, advance=1, description=title)
        if (step + 1) % SAVED_EVERY == 0:
            _save(state_file, model, optimizer, generator, run | {"done": step + 1})
            if not progress.console.is_terminal:
                progress.console.print(f"step {step + 1} of {steps}: {title}")
    with new_folder(folder, overwrite=True, marker_file="config.json") as staging:
        model.save_pretrained(staging)
        (staging / "model.safetensors").chmod(0o644)  # safetensors makes files that only their owner can read
        recall.tokenizer().save_pretrained(staging)


def _loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=recall.IGNORED)


def _save(file: Path, model, optimizer, generator: torch.Generator, run: dict[str, int]) -> None:
    buffer = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
    torch.save({**state, "run": run}, buffer)
    write_file(file, buffer.getvalue())


def _load(file: Path, model, optimizer, generator: torch.Generator, run: dict[str, int]) -> int:
    """Restore the state of an earlier run. Returns how many steps it has done, or 0 if there is no state."""
    if not file.is_file():
        return 0
    state = torch.load(file, weights_only=True)
    found = dict(state["run"])
    done = found.pop("done")
    if found != run:
        raise SurgeryError(f"{file} is the state of a run with {found}; this run has {run}. Delete it to start again.")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    return done
