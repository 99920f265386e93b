"""The flags of commands that can run many jobs at once. Ray itself is imported only when jobs run with --ray."""

import argparse

from model_preparation.command_line import CommandParser, number
from model_preparation.jobs.jobs import Runner, run_in_turn

HELP = """\
With --ray, many jobs run at once as tasks of a Ray cluster. Each job gets --cpus_per_job CPUs, and a GPU of
its own if the cluster has GPUs. Each job needs the memory of its model. All machines of a cluster need this
program and all folders in the flags at the same paths, on a shared file system. If a worker is lost, another
one continues its job.
"""


def add_ray_flags(parser: CommandParser) -> None:
    """Add `--ray` and `--cpus_per_job`."""
    parser.add_argument(
        "--ray",
        metavar="auto|local|HOST:PORT",
        help="run many jobs at once: local starts a Ray cluster on this machine and ends it afterwards, auto joins the "
        "cluster on this machine, HOST:PORT joins that cluster (default: one job after the other, without Ray)",
    )
    parser.add_argument(
        "--cpus_per_job",
        type=number(int, least=1),
        metavar="N",
        help="with --ray: CPUs of each job, which are also its threads (default: 1); with more, fewer jobs run at once",
    )


def chosen_runner(parser: CommandParser, args: argparse.Namespace) -> Runner:
    """The runner of the jobs, from the flags `ray`, `cpus_per_job`, `gpu` and `device`."""
    if not uses_ray(parser, args):
        return run_in_turn
    from model_preparation.jobs import ray_jobs

    return ray_jobs.RayRunner(args.ray, cpus_per_job=args.cpus_per_job or 1, device=args.device)


def uses_ray(parser: CommandParser, args: argparse.Namespace) -> bool:
    """Whether --ray is given. Ends with a usage error if other flags contradict it."""
    if args.ray is None:
        if args.cpus_per_job is not None:
            parser.error("--cpus_per_job belongs to --ray, which is not given")
        return False
    if args.gpu is not None or args.device not in (None, "cpu", "cuda"):
        parser.error("with --ray, each job gets a GPU from Ray: leave --gpu and --device out, or give --device cpu")
    return True
