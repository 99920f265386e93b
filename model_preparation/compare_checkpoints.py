"""Command: compare checkpoints, and say whether a difference is more than chance."""

from pathlib import Path

from model_preparation.command_line import CommandParser, number, run

DESCRIPTION = """\
Compare checkpoints by their evaluations, question by question, on the questions that all of them were asked.
For each group, and with --subjects for each subject, print each checkpoint's score and standard error. Also
print its difference from the first checkpoint, with McNemar's exact test and a bootstrap interval. Write a
report (comparison.html), and plots as PNG. The report also shows the costs that test_checkpoint.py
--efficiency measured.
"""

EPILOG = """\
Each DIR is a checkpoint with scores of `test_checkpoint.py --full_eval`, one of its evaluations (a folder in
evaluations/ or in a --results_dir), or any folder that `lm_eval --output_path DIR --log_samples` wrote.

examples:
  python compare_checkpoints.py ../model_checkpoints/best_2layer ../model_checkpoints/best_4layer
  python compare_checkpoints.py A B C --baseline B --subjects --output_dir ../reports/a_b_c --json
  python compare_checkpoints.py A stock_results --task mmlu_stem
  python compare_checkpoints.py A B --task gsm8k --metric exact_match,strict-match
"""


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    folders = args.folders
    if args.baseline is not None:
        resolved = args.baseline.expanduser().resolve()
        folders = [args.baseline, *(each for each in folders if each.expanduser().resolve() != resolved)]
    if len(folders) < 2:
        parser.error("at least two folders are needed for a comparison")

    from rich.console import Console

    from model_preparation.evaluation.compare.compare import compare_evaluations
    from model_preparation.evaluation.compare.report import check_report_folder, comparison_tables, write_report

    output_dir = args.output_dir.expanduser()
    check_report_folder(output_dir, overwrite=args.overwrite)  # now, not after the evaluations were read
    comparison = compare_evaluations(
        folders, task=args.task, metric=args.metric, seed=args.seed, resamples=args.bootstrap
    )
    write_report(comparison, output_dir, questions=args.questions, as_json=args.json, overwrite=args.overwrite)
    Console().print(comparison_tables(comparison, subjects=args.subjects))
    print(f"Report (comparison.html) and plots are in {output_dir}")


def _parser() -> CommandParser:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="two or more checkpoints or evaluations")
    parser.add_argument(
        "--baseline", type=Path, metavar="DIR", help="compare the others with this DIR (default: the first)"
    )
    parser.add_argument(
        "--task",
        metavar="NAME",
        help="compare only this task or group. If a checkpoint has several evaluations, NAME can also be the "
        "name of one evaluation's folder",
    )
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="a metric that lm-eval gives each question, as NAME, or NAME,FILTER if the task has several filters "
        "(default: acc if the task has it, else lm-eval's first metric of the task)",
    )
    parser.add_argument("--subjects", action="store_true", help="print the subjects too; the report always has them")
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("comparison_report"),
        metavar="DIR",
        help="the folder to write (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")
    parser.add_argument("--json", action="store_true", help="also write all numbers to comparison.json")
    parser.add_argument(
        "--questions",
        type=number(int, least=0),
        default=10,
        metavar="N",
        help="for each model, the report shows N questions that it answers better than the baseline, and N that it "
        "answers worse (default: %(default)s)",
    )
    parser.add_argument(
        "--bootstrap",
        type=number(int, least=100),
        default=10_000,
        metavar="N",
        help="resamples of the bootstrap (default: 10000)",
    )
    parser.add_argument(
        "--seed", type=number(int, least=0), default=1234, metavar="N", help="seed of the bootstrap (default: 1234)"
    )
    return parser


if __name__ == "__main__":
    run(main)
