"""Heals a real model on text that its donor wrote: a Llamba base with a few layers of SmolLM2-135M.

Donor, base and layers come from scripts/make_smollm2_donor.py, distill_llamba_base.py (or init_llamba_base.py) and
extract_layers.py. The donor writes the training text and the test text from different seeds. The losses in the last
table are of the test text, which neither a setting nor the choice of the best step used. Existing text and an existing
grafted checkpoint are used again. If the healing is stopped, the same command resumes it.

    python benchmarks/heal_real.py --donor DONOR --base BASE --llama_layers_dir LAYERS --folder FOLDER
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model_preparation import build_checkpoint, load_checkpoint
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.io.complete_file import write_file
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from model_preparation.train.distill.self_sampling import SelfSampler

COMMAND = Path(__file__).resolve().parents[1] / "model_preparation" / "heal_checkpoint.py"
SEQUENCES, TOKENS = 64, 256  # sequences in a file of text, and tokens in a sequence
TRAIN_SEED, TEST_SEED = 2_000_000, 3_000_000
RUN = {"method": "full", "teacher": "donor", "block_size": 128, "batch_size": 4, "learning_rate": 3e-4}
RUN |= {"precision": "bfloat16", "warmup": 0.1, "eval_interval": 20, "save_total_limit": 1, "logging_steps": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--donor", "--base", "--llama_layers_dir", "--folder"):
        parser.add_argument(name, type=Path, required=True, metavar="DIR")
    parser.add_argument("--layers", type=int, nargs="+", default=[20, 23, 24, 28], metavar="N", help="to graft")
    parser.add_argument(
        "--files", type=int, default=3, metavar="N", help="training files, of 16,384 tokens each (default: 3)"
    )
    parser.add_argument("--max_steps", type=int, default=220, metavar="N", help="steps of healing (default: 220)")
    args = parser.parse_args()

    started = time.perf_counter()
    (args.folder / "text").mkdir(parents=True, exist_ok=True)
    sampler = SelfSampler(args.donor, read_config(args.donor), "cpu")
    for number in range(args.files):
        write_text(args.donor, sampler, args.folder / "text" / f"{number}.jsonl", TRAIN_SEED + number)
    test = sampler.draw(SEQUENCES, TOKENS, TEST_SEED, lambda tokens: None)
    del sampler
    print(f"Text: {time.perf_counter() - started:.0f} s", flush=True)

    grafted, healed = args.folder / "grafted", args.folder / "grafted_v2_healed"
    if not grafted.exists():
        build_checkpoint(str(args.base), args.layers, args.llama_layers_dir, grafted, dtype=torch.float32)
    command: list[object] = [sys.executable, COMMAND, "--checkpoint", grafted, "--data", args.folder / "text"]
    command += [part for name, value in RUN.items() for part in (f"--{name}", value)]
    command += ["--device", "cpu", "--output_dir", healed, "--max_steps", args.max_steps]
    subprocess.run(list(map(str, command)), check=True)
    print(f"Text and healing: {time.perf_counter() - started:.0f} s", flush=True)

    print(f"| | loss on {test.numel():,} tokens that the donor wrote and no choice used | standard error |")
    print("|---|---|---|")
    for name, model in (
        ("base", AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)),
        ("grafted", load_checkpoint(grafted)[0]),
        ("healed", load_checkpoint(healed)[0]),
        ("donor", AutoModelForCausalLM.from_pretrained(args.donor, dtype=torch.float32)),
    ):
        losses = losses_of(model, test)
        print(f"| {name} | {losses.mean():.3f} | {losses.std() / len(losses) ** 0.5:.3f} |", flush=True)


@torch.inference_mode()
def losses_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """The mean loss of each row of `tokens` (sequences, length), in nats per token: (sequences,) float32."""
    logits = (model(row[None]).logits[0, :-1].float() for row in tokens)
    return torch.stack([F.cross_entropy(given, row[1:]) for given, row in zip(logits, tokens, strict=True)])


def write_text(donor: Path, sampler: SelfSampler, path: Path, seed: int) -> None:
    """Let the donor write text without a prompt into a file of JSON lines. An existing file is kept."""
    if not path.exists():
        ids = sampler.draw(SEQUENCES, TOKENS, seed, lambda tokens: None)
        texts = load_tokenizer(donor).batch_decode(ids[:, 1:], skip_special_tokens=True)
        write_file(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


if __name__ == "__main__":
    main()
