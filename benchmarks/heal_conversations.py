"""Healing on the donor's conversations, against healing on the donor's plain text, for the same number of steps.

A grafted checkpoint is healed twice with the donor as teacher. Only the data differs: conversations with
--packing, or about as many tokens of text. With --no_teacher, the checkpoints learn from the tokens alone. Both
results are then scored on conversations from another seed: the loss on the answers, paired by conversation.
These conversations were not used to choose anything. The script also compares kv-retrieval before and after
healing, and lets each checkpoint answer a question. Existing results are used again. The same command continues a
healing that was stopped.

    python benchmarks/heal_conversations.py --donor DONOR --base BASE --llama_layers_dir LAYERS --folder FOLDER
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.heal_real import write_text
from model_preparation import build_checkpoint, compare_evaluations, load_checkpoint
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.evaluation.generation import generate_text
from model_preparation.io.untrusted.untrusted_tokenizer import load_tokenizer
from model_preparation.train.distill.self_sampling import SelfSampler
from model_preparation.train.heal.self_conversations import write_conversations
from model_preparation.train.heal.sequences import load_sequences
from model_preparation.train.heal.settings import HealSettings

PACKAGE = Path(__file__).resolve().parents[1] / "model_preparation"
TRAIN_SEED, TEST_SEED, TEXT_SEED = 4, 5, 4_000_000
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
RUN = {"batch_size": 4, "learning_rate": 3e-4, "warmup": 0.1, "eval_interval": 20, "save_total_limit": 1}
RUN |= {"logging_steps": 5, "device": "cpu"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--donor", "--base", "--llama_layers_dir", "--folder"):
        parser.add_argument(name, type=Path, required=True, metavar="DIR")
    parser.add_argument("--layers", type=int, nargs="+", default=[20, 23, 24, 28], metavar="N", help="to graft")
    for name, default in (
        ("conversations", 256),
        ("tests", 64),
        ("max_steps", 200),
        ("block_size", 256),
        ("lengths", 256),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"(default: {default})")
    parser.add_argument(
        "--no_teacher", action="store_true", help="learn from the text, not from the donor's predictions"
    )
    parser.add_argument("--questions", type=int, default=50, metavar="N", help="of kv-retrieval (default: 50)")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args.donor)
    written = {}
    for seed, count in ((TRAIN_SEED, args.conversations), (TEST_SEED, args.tests)):
        settings = HealSettings(seed=seed, self_conversations=count, block_size=args.block_size)
        written[seed] = write_conversations(args.donor, tokenizer, settings, args.folder, "cpu")
    settings = HealSettings(block_size=args.block_size)
    train, test = (load_sequences(str(written[seed]), tokenizer, settings, print) for seed in (TRAIN_SEED, TEST_SEED))
    (args.folder / "text").mkdir(exist_ok=True)
    sampler = SelfSampler(args.donor, read_config(args.donor), "cpu")
    for number in range(-(-train.size // 16_384)):  # a file of text has 16,384 tokens
        write_text(args.donor, sampler, args.folder / "text" / f"{number}.jsonl", TEXT_SEED + number)
    del sampler

    checkpoints = {name: args.folder / name for name in ("grafted", "on_conversations", "on_text")}
    if not checkpoints["grafted"].exists():
        layers, folder = args.llama_layers_dir, checkpoints["grafted"]
        build_checkpoint(str(args.base), args.layers, layers, folder, dtype=torch.float32)
    for name, data in (("on_conversations", written[TRAIN_SEED]), ("on_text", args.folder / "text")):
        if not checkpoints[name].exists():
            flags = {**RUN, "max_steps": args.max_steps, "block_size": args.block_size, "data": data}
            flags |= {"checkpoint": checkpoints["grafted"], "output_dir": checkpoints[name]}
            flags |= {} if args.no_teacher else {"teacher": args.donor}
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            run("heal_checkpoint.py", flags, "--packing" if name == "on_conversations" else None)
            used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
            print(f"{name}: {used:.0f} s of processor time", flush=True)

    losses = {}
    for name, folder in checkpoints.items():
        model, own = load_checkpoint(folder, dtype=torch.float32)
        losses[name] = losses_of_answers(model, test)
        own.chat_template = tokenizer.chat_template
        print(f"{name} answers: {generate_text(model, own, QUESTION, max_new_tokens=40).text!r}", flush=True)
        flags = {"checkpoint": folder, "results_dir": args.folder / "results", "lengths": args.lengths}
        flags |= {"tasks": "kv_retrieval_choice", "limit": args.questions}
        run("test_checkpoint.py", flags, "--full_eval", "--skip_generation")
    losses["donor"] = losses_of_answers(AutoModelForCausalLM.from_pretrained(args.donor).float().eval(), test)
    print(f"| | loss on the answers of {len(test)} conversations | standard error |\n|---|---|---|")
    pairs = [("on_conversations", "on_text"), ("on_conversations", "grafted"), ("on_text", "grafted")]
    rows = [*losses.items(), *((f"{one} - {other}", losses[one] - losses[other]) for one, other in pairs)]
    for name, values in rows:
        print(f"| {name} | {values.mean():.3f} | {values.std() / len(values) ** 0.5:.3f} |")
    for row in compare_evaluations([args.folder / "results" / name for name in checkpoints]).rows:
        scores = ", ".join(f"{score.mean:.3f}" for score in row.scores)
        values = ", ".join(f"{difference.p_value:.3f}" for difference in row.differences)
        print(f"{row.label}: {scores} ({', '.join(checkpoints)}); p against the first: {values}")


def run(command: str, flags: dict, *more: str | None) -> None:
    given = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    subprocess.run([sys.executable, str(PACKAGE / command), *given, *filter(None, more)], check=True)


@torch.inference_mode()
def losses_of_answers(model, test) -> torch.Tensor:
    """The loss on the answers of each conversation, in nats per token: (conversations,) float32."""
    found = []
    for item in (test[index] for index in range(len(test))):
        logits = model(item["input_ids"][None]).logits[0, :-1].float()
        found.append(torch.nn.functional.cross_entropy(logits, item["labels"][1:]))
    return torch.stack(found)


if __name__ == "__main__":
    main()
