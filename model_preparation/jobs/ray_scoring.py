"""Scores sets of layers on a Ray cluster. Every worker has base, donor, and a shard of the questions.

The answers are those of `SharedScorer`, bit for bit, because a worker runs each batch as this process would. A
worker keeps the base's hidden states of its shard for all candidates. If a worker is lost, a new one takes the shard
and gives the missing answers. Every answer is counted once.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from model_preparation.devices import choose_device
from model_preparation.errors import SurgeryError
from model_preparation.jobs.ray_cluster import cluster, job_variables
from model_preparation.jobs.ray_gpus import gpus_per_job
from model_preparation.search.layer_sets import LayerSet
from model_preparation.search.question_set import Batch
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.settings import SearchSettings
from model_preparation.search.shared_scoring import Results, SharedScorer

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_LOST = ("ActorDiedError", "ActorUnavailableError", "ObjectLostError", "WorkerCrashedError", "NodeDiedError")
_MAX_RETRIES = 3  # of one shard, without any answer in between


class QuestionShard:
    """Answers a shard of the questions on a worker. Ray makes this object there, and calls its methods.

    Args:
        settings: the search's settings, but `device` is the type of the worker's device.
        folder: where the search was started; relative paths start there.
        threads: how many threads torch uses.
        batches: indices of the shard's batches.
    """

    def __init__(self, settings: SearchSettings, folder: str, threads: int, batches: Sequence[int]):
        import torch

        os.chdir(folder)
        torch.set_num_threads(threads)
        self._settings, self._batches = settings, batches

    @cached_property
    def _scorer(self) -> SharedScorer:
        # Not in __init__: Ray would report an error there as a lost worker.
        settings = replace(self._settings, device=choose_device(device=self._settings.device))
        return SharedScorer(ScoringSetup(settings), self._batches)

    def base(self) -> Iterator[tuple[Results, float]]:
        """Yields one pair: the base's answers, and the layer passes that they took."""
        yield self._scorer.base(), self._scorer.layer_passes

    def donor_answers(self) -> Iterator[tuple[Results, float]]:
        """Yields one pair: the donor's own answers, and 0 layer passes."""
        yield self._scorer.donor_answers(), 0.0

    def score(self, sets: Sequence[LayerSet], batches: Sequence[int]) -> Iterator[tuple[LayerSet, Results, float]]:
        """Yields each set with its answers, and with the layer passes since the set before."""
        before = self._scorer.layer_passes
        for layers, results in self._scorer.score(sets, batches):
            yield layers, results, self._scorer.layer_passes - before
            before = self._scorer.layer_passes


@dataclass
class _Worker:
    """The worker that has a shard now. It must still answer the batches in `chosen` for the sets in `left`."""

    batches: list[int]
    actor: Any
    chosen: list[int] = field(default_factory=list)
    left: dict[LayerSet, None] = field(default_factory=dict)
    retries: int = 0


class RemoteScorer:
    """Scores sets of layers on a cluster, as `SharedScorer` does in one process.

    Args:
        ray: the module `ray`, which has joined a cluster.
        setup: has the questions.
        workers: how many workers there may be.
        make: makes a worker for the batches of a shard.

    Attributes:
        layer_passes: as in `SharedScorer`. Passes of a lost worker count only if it returned their answers.
    """

    def __init__(self, ray: Any, setup: ScoringSetup, workers: int, make: Callable[[list[int]], Any]):
        self._ray = ray
        self._make = make
        self._lost = tuple(getattr(ray.exceptions, name) for name in _LOST)
        self.layer_passes = 0.0
        self._workers = [_Worker(batches, make(batches)) for batches in shards(setup.questions.batches, workers)]

    def base(self) -> Results:
        """As `SharedScorer.base`."""
        return self._ask_all("base")

    def donor_answers(self) -> Results:
        """As `SharedScorer.donor_answers`."""
        return self._ask_all("donor_answers")

    def score(
        self, sets: Iterable[LayerSet], batches: Sequence[int] | None = None
    ) -> Iterator[tuple[LayerSet, Results]]:
        """As `SharedScorer.score`."""
        wanted = list(sets)
        for worker in self._workers:
            worker.chosen = [batch for batch in worker.batches if batches is None or batch in batches]
            worker.left = dict.fromkeys(wanted)
        asked = [worker for worker in self._workers if worker.chosen]
        gathered: dict[LayerSet, Results] = {layers: {} for layers in wanted}
        missing = dict.fromkeys(wanted, len(asked))
        answers = self._answers(asked, "score", lambda worker: (list(worker.left), worker.chosen))
        for worker, (layers, found, passes) in answers:
            self.layer_passes += passes
            if layers in worker.left:
                del worker.left[layers]
                gathered[layers] |= found
                missing[layers] -= 1
                if not missing[layers]:
                    yield layers, gathered.pop(layers)

    def _ask_all(self, method: str) -> Results:
        results: Results = {}
        for _, (found, passes) in self._answers(self._workers, method, lambda worker: ()):
            results |= found
            self.layer_passes += passes
        return results

    def _answers(
        self, workers: Sequence[_Worker], method: str, arguments: Callable[[_Worker], tuple[Any, ...]]
    ) -> Iterator[tuple[_Worker, Any]]:
        """Call a method of `QuestionShard` on workers; yields (worker, answer) as they come. Replaces lost workers."""

        def ask(worker: _Worker) -> Any:
            return getattr(worker.actor, method).options(num_returns="streaming").remote(*arguments(worker))

        running = {ask(worker): worker for worker in workers}
        try:
            while running:
                # The wait ends after a second at the latest, so that Python can handle a signal.
                for answers in self._ray.wait(list(running), num_returns=1, timeout=1)[0]:
                    worker = running[answers]
                    try:
                        found = self._ray.get(next(answers))
                    except StopIteration:
                        del running[answers]
                    except self._lost:
                        del running[answers]
                        self._replace(worker)
                        running[ask(worker)] = worker
                    except SurgeryError as error:  # Ray adds the worker's traceback to the message
                        raise SurgeryError(
                            f"A worker of the search failed: {getattr(error, 'cause', error)}"
                        ) from error
                    else:
                        worker.retries = 0
                        yield worker, found
        finally:
            for answers in running:
                self._ray.cancel(answers)

    def _replace(self, worker: _Worker) -> None:
        """Give the shard to a new worker."""
        worker.retries += 1
        if worker.retries > _MAX_RETRIES:
            raise SurgeryError(
                f"A worker of {len(worker.batches)} batches was lost {worker.retries} times in a row. Check that its "
                "machine has enough memory, and run the same command again: finished evaluations are kept."
            )
        print(f"A worker was lost; another one gets its questions ({worker.retries} of {_MAX_RETRIES} retries)")
        worker.actor = self._make(worker.batches)


def shards(batches: Sequence[Batch], workers: int) -> list[list[int]]:
    """Split the indices of batches into at most `workers` shards with about equally many tokens.

    No shard is empty.
    """
    found: list[list[int]] = [[] for _ in range(min(workers, len(batches)))]
    tokens = [0] * len(found)
    # From the largest batch to the smallest, each goes to the shard with the fewest tokens so far.
    for number in sorted(range(len(batches)), key=lambda number: (-batches[number].inputs.numel(), number)):
        least = tokens.index(min(tokens))
        found[least].append(number)
        tokens[least] += batches[number].inputs.numel()
    return [sorted(shard) for shard in found]


@contextlib.contextmanager
def remote_scorer(
    address: str, cpus: int, device: str | None
) -> Iterator[tuple[Callable[[ScoringSetup], RemoteScorer], str]]:
    """Join a cluster for the length of a `with` block; yields a function that makes scorers, and "cuda" or "cpu".

    Args:
        address: as `cluster` takes it.
        cpus: CPUs of each worker, and its number of threads.
        device: as `gpus_per_job` takes it.

    Raises:
        SurgeryError: for the same reasons as `cluster` and `gpus_per_job`.
    """
    with cluster(address) as ray:
        gpus = gpus_per_job(ray, device, cpus)
        kind = "cuda" if gpus else "cpu"
        room = ray.cluster_resources()["GPU" if gpus else "CPU"] // (1 if gpus else cpus)
        variables = job_variables()
        paths = [_PACKAGE_ROOT, *filter(None, [variables.get("PYTHONPATH")])]
        variables |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(cpus)}
        worker = ray.remote(QuestionShard).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": variables}
        )

        def make_scorer(setup: ScoringSetup) -> RemoteScorer:
            settings = replace(setup.settings, device=kind)

            def make(batches: list[int]) -> Any:
                return worker.remote(settings, os.getcwd(), cpus, batches)

            return RemoteScorer(ray, setup, max(1, int(room)), make)

        yield make_scorer, kind
