"""Perplexity of a donor, of a base before and after distillation, and with the base's worst layers replaced.

The worst layers are those with the largest error on held-out tokens (distillation.json). The script builds checkpoints
by create_replaced_model_checkpoint.py. It measures on two texts: one that the donor writes with a seed that no training
used, and a file.

    python benchmarks/distill_grafts.py --donor DONOR --initial BASE --base DISTILLED --layers_dir LAYERS --folder DIR
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from model_preparation import load_checkpoint
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from model_preparation.train.distill.self_sampling import SelfSampler
from model_preparation.train.distill.tokens import tokens_of_text

ROOT = Path(__file__).resolve().parents[1]
LENGTH, SEQUENCES, SEED = 256, 4, 1_000_000


@torch.inference_mode()
def perplexity(model, tokens: torch.Tensor) -> float:
    """Perplexity of (sequences, length) tokens. The model reads each sequence separately."""
    total = sum(
        F.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:], reduction="sum").item() for row in tokens
    )
    return math.exp(total / tokens[:, 1:].numel())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--donor", "--initial", "--base", "--layers_dir", "--folder"):
        parser.add_argument(flag, type=Path, required=True)
    parser.add_argument("--text", type=Path, default=ROOT / "README.md", help="a file of text (default: README.md)")
    parser.add_argument("--worst", type=int, nargs="+", default=[2, 4, 8], metavar="K")
    args = parser.parse_args()

    layers = json.loads((args.base / "distillation.json").read_text())["layers"]
    by_error = [row["layer"] for row in sorted(layers, key=lambda row: -row["final"])]
    tokenizer = load_tokenizer(args.donor)
    sampler = SelfSampler(args.donor, read_config(args.donor), "cpu")
    own = sampler.draw(SEQUENCES, LENGTH, SEED, lambda tokens: None)
    del sampler
    text = args.folder / "text.txt"
    text.write_text(args.text.read_text(encoding="utf-8"), encoding="utf-8")
    read = tokens_of_text([text], tokenizer, LENGTH, SEQUENCES * LENGTH, lambda tokens: None)

    def row(name: str, model) -> None:
        print(f"| {name} | {perplexity(model, own):.4g} | {perplexity(model, read):.4g} |", flush=True)

    print(f"| | {own.numel()} tokens that the donor wrote | {read.numel()} tokens of {args.text.name} |\n|---|---|---|")
    for name, folder in (("donor", args.donor), ("initial base", args.initial), ("distilled base", args.base)):
        row(name, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    for count in args.worst:
        worst = sorted(by_error[:count])
        checkpoint = args.folder / f"worst_{count}"
        command = [sys.executable, ROOT / "model_preparation" / "create_replaced_model_checkpoint.py", "--overwrite"]
        command += ["--base", args.base, "--llama_layers_dir", args.layers_dir, "--output_dir", checkpoint]
        command += ["--device", "cpu", "--layers", *worst]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        row(f"distilled base with layers {' '.join(map(str, worst))}", load_checkpoint(checkpoint, device="cpu")[0])


if __name__ == "__main__":
    main()
