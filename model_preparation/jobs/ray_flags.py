"""The flags of commands that can run many jobs at once. Ray itself is imported when jobs run, and only with --ray."""

import argparse

from model_preparation.command_line import CommandParser, number
from model_preparation.jobs.jobs import Runner, run_in_turn

HELP = """\
With --ray, many run at once as tasks of a Ray cluster, each with a GPU of its own where the cluster has GPUs, else with
--cpus_per_job CPUs; each takes the memory of its model. The machines of a cluster need this program and all folders
named at the same paths, on a shared file system. If a worker is lost, another one goes on with its job.
"""


def add_ray_flags(parser: CommandParser) -> None:
    """Add `--ray` and `--cpus_per_job`."""
    parser.add_argument(
        "--ray",
        metavar="auto|local|HOST:PORT",
        help="many at once: local starts a Ray cluster on this machine and ends it, auto joins the one that runs here, "
        "HOST:PORT that one (default: one after the other, without Ray)",
    )
    parser.add_argument(
        "--cpus_per_job",
        type=number(int, least=1),
        metavar="N",
        help="with --ray: CPUs, so threads, of each job (default: 1); fewer jobs run at once the larger it is",
    )


def chosen_runner(parser: CommandParser, args: argparse.Namespace) -> Runner:
    """How the command line wants jobs to be run; ends with a usage error for flags that go against each other.

    Args:
        args: with `ray`, `cpus_per_job`, `gpu` and `device`.
    """
    if args.ray is None:
        if args.cpus_per_job is not None:
            parser.error("--cpus_per_job belongs to --ray, which is not given")
        return run_in_turn
    check(parser, args)
    from model_preparation.jobs import ray_jobs

    return ray_jobs.RayRunner(args.ray, cpus_per_job=args.cpus_per_job or 1, device=args.device)


def check(parser: CommandParser, args: argparse.Namespace) -> None:
    """End with a usage error where --ray is given with a device that is not Ray's to choose."""
    if args.gpu is not None or args.device not in (None, "cpu", "cuda"):
        parser.error("with --ray, each job gets a GPU from Ray: leave --gpu and --device out, or give --device cpu")
