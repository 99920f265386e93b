"""Training steps on packed documents against padded ones: real tokens per second of processor time, and their ratio.

The model has 6 layers, 2 of them grafted, and random weights. The documents' lengths are drawn from a lognormal
distribution and clipped to the block, or are the lengths of conversations in a file (--data and --tokenizer). Padded
batches are as heal_checkpoint.py makes them: each is padded to its longest document. Both sides train on every document
once, forward and backward, and take turns after each batch.

    OMP_NUM_THREADS=1 python benchmarks/packing_speed.py
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from model_preparation.llamba import LlambaConfig, LlambaForCausalLM
from model_preparation.train.heal.sequences import Documents, Shuffled, collate, load_sequences
from model_preparation.train.heal.settings import HealSettings

VOCABULARY, SIGMA, SHORTEST = 4096, 0.65, 16
GOAL = 1.5  # if on average 50% of a padded batch are real tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("documents", 128), ("block_size", 512), ("batch_size", 8), ("mean", 160), ("width", 256)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})")
    parser.add_argument("--data", metavar="FILE", help="take the lengths of these conversations")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="tokenizer with a chat template, for --data")
    args = parser.parse_args()
    if (args.data is None) != (args.tokenizer is None):
        parser.error("--data and --tokenizer go together")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    lengths = lengths_of(args)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, VOCABULARY, length, dtype=np.int32) for length in lengths]
    documents = [np.stack([each, np.append(np.int32(-100), each[1:])]) for each in ids]
    model = make_model(args.width)
    sides = {
        name: Side(sequences_of(documents, args.block_size, name == "packed"), args.batch_size, model)
        for name in ("padded", "packed")
    }
    for _ in documents:  # at least as many turns as a side has batches
        for side in sides.values():
            side.step()
    print(
        f"{len(lengths)} documents, {sum(lengths):,} tokens, {np.mean(lengths):.0f} on average, at most {max(lengths)}"
    )
    print("| | batches | filled | tokens per second |")
    print("|---|---|---|---|")
    for name, side in sides.items():
        print(f"| {name} | {side.batches} | {side.tokens / side.places:.0%} | {side.speed:,.0f} |")
    ratio = sides["packed"].speed / sides["padded"].speed
    print(f"Training on packed documents is {ratio:.2f} times as fast (goal: {GOAL} at a fill of 50%)")


def sequences_of(documents: list[np.ndarray], block_size: int, packing: bool) -> Documents:
    settings = HealSettings(block_size=block_size, packing=packing)
    return Documents(documents, settings, are_conversations=True)


class Side:
    """Batches of one kind, and the processor time of the training steps on them."""

    def __init__(self, sequences: Documents, batch_size: int, model: LlambaForCausalLM):
        self._model = model
        shuffled = Shuffled(sequences, 0, 0, len(sequences))
        firsts = range(0, len(sequences), batch_size)
        self._batches: Iterator = (
            collate([shuffled[index] for index in range(first, min(first + batch_size, len(sequences)))])
            for first in firsts
        )
        self.batches, self.tokens, self.places, self.seconds = 0, sequences.size, 0, 0.0

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds

    def step(self) -> None:
        """One training step, if a batch is left."""
        started = time.process_time()
        batch = next(self._batches, None)
        if batch is None:
            return
        self._model.zero_grad()
        self._model(**{name: batch[name] for name in batch if name != "sequence"}).loss.backward()
        self.seconds += time.process_time() - started
        self.batches += 1
        self.places += batch["input_ids"].numel()


def lengths_of(args: argparse.Namespace) -> list[int]:
    if args.data is not None:
        settings = HealSettings(block_size=args.block_size, long_conversations="drop")
        found = load_sequences(args.data, load_tokenizer(args.tokenizer), settings, print)
        return [len(found[index]["labels"]) for index in range(len(found))][: args.documents]
    drawn = np.random.default_rng(0).lognormal(np.log(args.mean) - SIGMA**2 / 2, SIGMA, args.documents)
    return drawn.round().astype(int).clip(SHORTEST, args.block_size).tolist()


def make_model(width: int) -> LlambaForCausalLM:
    torch.manual_seed(0)
    heads = width // 64
    llama = {"num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": 64, "intermediate_size": 3 * width}
    config = LlambaConfig(
        vocab_size=VOCABULARY,
        d_model=width,
        n_layer=6,
        ssm_cfg={"d_state": 64, "n_v_heads": heads, "n_qk_heads": heads, "chunk_size": 128},
        mlp_cfg={"intermediate_size": 3 * width},
        llama_layers=[2, 4],
        llama_cfg={**llama, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    )
    return LlambaForCausalLM(config).train()


if __name__ == "__main__":
    main()
