"""The error of each layer of a base, before and after distilling, for donors of each kind.

Tiny donors of one shape learn the bytes of this repository's documents. Each layer's mixer then starts as
`init_llamba_base.py` starts it, and is trained as `distill_llamba_base.py` trains it. Some kinds have more tensors than
a Llama: biases, or norms of queries and keys. In a row "left out", the mixer starts without these tensors. This shows
what they are worth.

    python benchmarks/donor_kinds.py
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from model_preparation.llamba.donor_kinds import KINDS, DonorKind
from model_preparation.train.distill.student_layer import student_config, student_layer, student_tensors
from model_preparation.train.distill.train_layer import in_order, relative_error, shuffled, train_layer

ROOT = Path(__file__).resolve().parents[1]
LENGTH, HELD_OUT, SEED = 128, 16, 0
WINDOW = 32
SHAPE = {
    **{"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 160},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH},
}
# Config fields of each kind that a Llama's config does not need.
SETTINGS: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"sliding_window": None, "head_dim": 16},
}
BEYOND = (".bias", "_norm.weight")  # ends of the names of tensors that a Llama does not have


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor_steps", type=int, default=300)
    parser.add_argument("--steps_per_layer", type=int, default=100)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    documents = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
    read = b"".join(path.read_bytes() for path in documents)
    tokens = torch.frombuffer(bytearray(read), dtype=torch.uint8).long()
    tokens = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(SEED))]
    print(f"{len(tokens) - HELD_OUT} sequences of {LENGTH} bytes, {HELD_OUT} held out\n")
    print(f"| donor | its loss | {' | '.join(f'layer {i}' for i in range(SHAPE['num_hidden_layers']))} |")
    print("|---|---|" + "---|" * SHAPE["num_hidden_layers"])
    for kind in map(KINDS.__getitem__, args.kinds):
        donor, loss = trained_donor(kind, tokens, args.donor_steps)
        variants = {kind.model_type: ()}
        if any(name.endswith(BEYOND) and ".self_attn." in name for name, _ in donor.named_parameters()):
            variants[f"{kind.model_type}, left out"] = BEYOND
        for name, left_out in variants.items():
            errors = [f"{before:.3f} -> {after:.3f}" for before, after in layers(donor, tokens, args, left_out)]
            print(f"| {name} | {loss:.2f} | {' | '.join(errors)} |", flush=True)


def trained_donor(kind: DonorKind, tokens: Tensor, steps: int) -> tuple[PreTrainedModel, float]:
    """A donor that learned the text, and its loss on the held-out sequences."""
    torch.manual_seed(SEED)
    config = kind.transformers_class("Config")(**SHAPE, **SETTINGS[kind.model_type])
    donor = kind.transformers_class("ForCausalLM")(config)
    optimizer = torch.optim.AdamW(donor.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for step in range(steps):
        rows = torch.randint(0, len(tokens) - HELD_OUT, (16,), generator=torch.Generator().manual_seed(step))
        donor(tokens[rows], labels=tokens[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    held_out = tokens[-HELD_OUT:]
    with torch.no_grad():
        return donor.eval(), donor(held_out, labels=held_out).loss.item()


def layers(
    donor: PreTrainedModel, tokens: Tensor, args: argparse.Namespace, left_out: tuple[str, ...]
) -> Iterator[tuple[float, float]]:
    """(error before, error after) the training of each layer, on the held-out sequences."""
    config = student_config(donor.config)
    with torch.no_grad():
        entering = donor(tokens, output_hidden_states=True).hidden_states
    for index, layer in enumerate(donor.model.layers):
        states = entering[index]
        kept = {
            name: t
            for name, t in layer.state_dict().items()
            if not (name.startswith("self_attn") and name.endswith(left_out))
        }
        student = student_layer(student_tensors(kept, donor.config, config, SEED), config, "cpu")
        before = relative_error(layer, student, in_order(states[-HELD_OUT:]))
        batches = shuffled(states[:-HELD_OUT], None, 8, SEED)
        train_layer(layer, student, batches, steps=args.steps_per_layer, learning_rate=2e-3)
        yield before, relative_error(layer, student, in_order(states[-HELD_OUT:]))


if __name__ == "__main__":
    main()
