"""The flags of a command that lets a model write, and what they ask for.

In: a parser, then its parsed arguments. Out: a `Request`. Nothing heavy is imported before the command line is right.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from model_preparation.command_line import CommandParser, number
from model_preparation.evaluation.prompts import FORMS, Prompt, read_prompts
from model_preparation.hub.sources import add_source_flag, names_behind, tokenizer_name

if TYPE_CHECKING:
    from model_preparation.evaluation.generation import Sampling

DEFAULT_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village,",
    "To make a good cup of tea, first",
)
RECORDED = {"donor": "replacement_source", "base": "base_model"}  # name in --compare_with: field of the checkpoint
_SAMPLING_FLAGS = ("temperature", "top_p", "top_k")
# All but --seed and --source, which the evaluation has too.
GENERATION_FLAGS: tuple[str, ...] = ("prompt", "prompts_file", "chat", "max_new_tokens", "do_sample", *_SAMPLING_FLAGS)
GENERATION_FLAGS += ("num_return_sequences", "compare_with", "output")


@dataclass(frozen=True)
class Request:
    """What a model is to write."""

    prompts: Sequence[Prompt]
    max_new_tokens: int
    sampling: "Sampling | None"  # None: greedily
    count: int  # texts per prompt
    chat: bool  # whether texts go through the chat template too
    output: Path | None  # where the results go


def add_generation_flags(parser: CommandParser) -> None:
    """Add the flags for prompts, decoding, comparison and results, and --seed, which the evaluation shares."""
    at_least_1 = number(int, least=1)
    parser.add_argument(
        "--prompt", nargs="+", default=[], metavar="TEXT", help="texts to continue (default: three of ours)"
    )
    parser.add_argument(
        "--prompts_file",
        type=Path,
        metavar="FILE",
        help=f"more prompts: .txt, one per line; .jsonl, one per line, or .json, a list, of {FORMS}",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put every text into the tokenizer's chat template, as a user's message (default: texts are continued as "
        "they stand, as base models do; messages always go through the template)",
    )
    parser.add_argument(
        "--max_new_tokens",
        type=at_least_1,
        default=50,
        metavar="N",
        help="tokens to write per prompt (default: 50)",
    )
    parser.add_argument(
        "--do_sample",
        action="store_true",
        help="draw tokens at random; each of the next three implies it (default: the likeliest token each time)",
    )
    parser.add_argument(
        "--temperature",
        type=number(float, above=0),
        metavar="X",
        help="below 1 likely tokens become likelier, above 1 less likely (default: 1)",
    )
    parser.add_argument(
        "--top_p",
        type=number(float, above=0, most=1),
        metavar="P",
        help="draw among the likeliest tokens of this joint probability (default: 1, all)",
    )
    parser.add_argument(
        "--top_k", type=at_least_1, metavar="K", help="draw among the K likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--num_return_sequences",
        type=at_least_1,
        default=1,
        metavar="N",
        help="texts to draw per prompt, one after the other (default: 1)",
    )
    parser.add_argument(
        "--seed",
        type=number(int, least=0, most=2**32 - 1),  # NumPy takes no larger one
        default=1234,
        metavar="N",
        help="seed of what is drawn at random, here and in the evaluation (default: 1234)",
    )
    parser.add_argument(
        "--compare_with",
        nargs="+",
        action="extend",
        default=[],
        metavar="MODEL",
        help="let other models write too, and show the texts side by side: `donor` or `base` of this checkpoint, "
        "another checkpoint's folder, or a model's folder, name or hub id; loaded one after the other",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.jsonl",
        help="also write every text with its tokens, speeds and settings into this file",
    )
    add_source_flag(parser)


def check_generation_flags(parser: CommandParser, args: argparse.Namespace) -> None:
    """End the command, as for wrong usage, where flags do not go together."""
    if args.num_return_sequences > 1 and not _samples(args):
        parser.error(
            "--num_return_sequences needs --do_sample, --temperature, --top_p or --top_k; greedy texts are all the same"
        )
    repeated = {name for name in args.compare_with if args.compare_with.count(name) > 1}
    if repeated:
        parser.error(f"--compare_with has {sorted(repeated)[0]} more than once")
    asked_for = [str(args.checkpoint), *args.compare_with, args.tokenizer or tokenizer_name(str(args.checkpoint)) or ""]
    used = {name for given in asked_for for name in names_behind(given, args.source)}
    idle = sorted(args.source.keys() - used)
    if idle and not set(args.compare_with) & RECORDED.keys():
        parser.error(f"--source {idle[0]}=... does nothing: no --checkpoint, --compare_with or --tokenizer names it")


def read_request(args: argparse.Namespace) -> Request:
    """What the flags ask for; reads the file of prompts.

    Raises:
        SurgeryError: if that cannot be read, or the results could not be written.
    """
    from model_preparation.evaluation.generation import Sampling
    from model_preparation.io.complete_file import check_new_file

    prompts = [*args.prompt, *([] if args.prompts_file is None else read_prompts(args.prompts_file))]
    output = None if args.output is None else args.output.expanduser()
    if output is not None:
        check_new_file(output)
    sampling = None
    if _samples(args):
        given = {flag: getattr(args, flag) for flag in _SAMPLING_FLAGS if getattr(args, flag) is not None}
        sampling = Sampling(**given, seed=args.seed)
    return Request(
        prompts or DEFAULT_PROMPTS, args.max_new_tokens, sampling, args.num_return_sequences, args.chat, output
    )


def _samples(args: argparse.Namespace) -> bool:
    return args.do_sample or any(getattr(args, flag) is not None for flag in _SAMPLING_FLAGS)
