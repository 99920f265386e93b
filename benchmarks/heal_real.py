"""Heals a real model on text that its donor wrote: SmolLM2-135M with most layers grafted into an untrained Llamba.

Donor, base and layers come from scripts/make_smollm2_donor.py, init_llamba_base.py and extract_layers.py. What is there
already, text and checkpoint, is used again; the healing itself is stopped and resumed like any other.

    python benchmarks/heal_real.py --donor DONOR --base BASE --llama_layers_dir LAYERS --folder FOLDER
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MAMBA_LAYERS = (3, 6, 9, 12, 15, 18, 21, 24, 27)  # of SmolLM2's 30; the others are grafted
SEQUENCES, TOKENS = 64, 256  # of a file of text
RUN = {"method": "neighbours", "teacher": "donor", "block_size": 128, "batch_size": 4}
RUN |= {"learning_rate": 1e-4, "warmup": 0.1, "eval_interval": 20, "eval_fraction": 0.03, "save_total_limit": 1}
RUN |= {"logging_steps": 2, "device": "cpu"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--donor", "--base", "--llama_layers_dir", "--folder"):
        parser.add_argument(name, type=Path, required=True, metavar="DIR")
    parser.add_argument("--files", type=int, default=3, metavar="N", help="of text, 16,384 tokens each (default: 3)")
    parser.add_argument("--max_steps", type=int, default=60, metavar="N", help="of healing; 0: only write text")
    args = parser.parse_args()

    import torch

    from model_preparation import build_checkpoint
    from model_preparation.heal_checkpoint import main as heal

    (args.folder / "text").mkdir(parents=True, exist_ok=True)
    for seed in range(args.files):
        path = args.folder / "text" / f"{seed}.jsonl"
        if not path.exists():
            write_text(args.donor, path, seed)
    if not args.max_steps:
        return
    checkpoint = args.folder / "grafted"
    if not checkpoint.exists():
        layers = sorted(set(range(30)) - set(MAMBA_LAYERS))
        build_checkpoint(str(args.base), layers, args.llama_layers_dir, checkpoint, dtype=torch.float32)
    sys.argv[1:] = ["--checkpoint", str(checkpoint), "--data", str(args.folder / "text")]
    sys.argv += [str(part) for name, value in RUN.items() for part in (f"--{name}", value)]
    sys.argv += ["--output_dir", str(args.folder / "grafted_v2_healed"), "--max_steps", str(args.max_steps)]
    heal()


def write_text(donor: Path, path: Path, seed: int) -> None:
    """Let the donor write from nothing, drawing from its whole distribution, into a file of JSON lines."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from model_preparation.files.new_file import write_file

    tokenizer = AutoTokenizer.from_pretrained(donor)
    model = AutoModelForCausalLM.from_pretrained(donor, dtype=torch.float32)
    start = torch.full((SEQUENCES, 1), model.config.bos_token_id)
    torch.manual_seed(seed)
    mask = torch.ones_like(start)
    ids = model.generate(
        start, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=TOKENS, min_new_tokens=TOKENS
    )
    texts = tokenizer.batch_decode(ids[:, 1:], skip_special_tokens=True)
    write_file(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    main()
