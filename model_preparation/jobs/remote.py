"""Scoring spread over a Ray cluster: every worker holds base and donor, and a share of the questions.

In: sets of layers. Out: what `CachedScorer` gives, to the bit: a worker runs each batch as it would be run here. Each
keeps the base's hidden states of its own share, which serve all candidates. When a worker is lost, a new one takes its
share over and is asked for what is missing; an answer is taken once, whoever gives it.
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
from model_preparation.jobs.ray_jobs import VARIABLES, check_size, cluster, gpus_per_job
from model_preparation.search.cached_scoring import CachedScorer, Results
from model_preparation.search.layer_sets import LayerSet
from model_preparation.search.setup import Setup, Spec

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_LOST = ("ActorDiedError", "ActorUnavailableError", "ObjectLostError", "WorkerCrashedError", "NodeDiedError")
_MAX_RETRIES = 3  # of one share, without any answer in between


class Share:
    """A worker's part of the questions; made and called by Ray."""

    def __init__(self, spec: Spec, folder: str, threads: int, batches: Sequence[int]):
        import torch

        os.chdir(folder)  # paths count from where the search was started
        torch.set_num_threads(threads)
        self._spec, self._batches = spec, batches

    @cached_property
    def _scorer(self) -> CachedScorer:
        # Not before something is asked: Ray takes what goes wrong earlier for a worker that was lost.
        return Setup(replace(self._spec, device_here=choose_device(device=self._spec.device))).scorer(self._batches)

    def donor_answers(self) -> Results:
        """As `CachedScorer.donor_answers`."""
        return self._scorer.donor_answers()

    def base(self) -> tuple[Results, float]:
        """The base's answers, and the layer passes they took."""
        results = self._scorer.base()
        return results, self._scorer.layer_passes

    def score(self, sets: Sequence[LayerSet], batches: Sequence[int]) -> Iterator[tuple[LayerSet, Results, float]]:
        """Each set's answers, and the layer passes since the one before."""
        before = self._scorer.layer_passes
        for layers, results in self._scorer.score(sets, batches):
            yield layers, results, self._scorer.layer_passes - before
            before = self._scorer.layer_passes


@dataclass
class _Worker:
    """Who holds a share now, and what it has still to say."""

    batches: list[int]
    actor: Any
    left: dict[LayerSet, None] = field(default_factory=dict)
    retries: int = 0


class RemoteScorer:
    """What scores sets of layers on a cluster, as `CachedScorer` does here.

    Args:
        ray: the module, part of a cluster.
        setup: for the questions, which are shared out.
        workers: how many there are to be at most.
        make: makes a worker of a share.
        say: told when a worker is lost.

    Attributes:
        layer_passes: as `CachedScorer`'s; what a lost worker had run without telling is not among them.
    """

    def __init__(
        self, ray: Any, setup: Setup, workers: int, make: Callable[[list[int]], Any], say: Callable[[str], None]
    ):
        self._ray = ray
        self._make = make
        self._say = say
        self._lost = tuple(getattr(ray.exceptions, name) for name in _LOST)
        self.layer_passes = 0.0
        self._workers = [_Worker(batches, make(batches)) for batches in share_out(setup, workers)]

    def base(self) -> Results:
        """As `CachedScorer.base`."""
        results: Results = {}
        for found, passes in self._ask_all("base"):
            results |= found
            self.layer_passes += passes
        return results

    def donor_answers(self) -> Results:
        """As `CachedScorer.donor_answers`."""
        results: Results = {}
        for found in self._ask_all("donor_answers"):
            results |= found
        return results

    def score(
        self, sets: Iterable[LayerSet], batches: Sequence[int] | None = None
    ) -> Iterator[tuple[LayerSet, Results]]:
        """As `CachedScorer.score`."""
        wanted = list(sets)
        gathered: dict[LayerSet, Results] = {layers: {} for layers in wanted}
        running: dict[Any, _Worker] = {}
        missing = dict.fromkeys(wanted, 0)
        for worker in self._workers:
            chosen = [batch for batch in worker.batches if batches is None or batch in batches]
            if chosen:
                worker.left = dict.fromkeys(wanted)
                running[self._ask(worker, chosen)] = worker
                missing = {layers: count + 1 for layers, count in missing.items()}
        try:
            while running:
                # Now and then it returns with nothing, for a signal to be seen.
                for answers in self._ray.wait(list(running), num_returns=1, timeout=1)[0]:
                    worker = running[answers]
                    try:
                        layers, found, passes = self._get(next(answers))
                    except StopIteration:
                        del running[answers]
                        continue
                    except self._lost:
                        del running[answers]
                        self._replace(worker)
                        chosen = [batch for batch in worker.batches if batches is None or batch in batches]
                        running[self._ask(worker, chosen)] = worker
                        continue
                    worker.retries = 0
                    self.layer_passes += passes
                    if layers in worker.left:
                        del worker.left[layers]
                        gathered[layers] |= found
                        missing[layers] -= 1
                        if not missing[layers]:
                            yield layers, gathered.pop(layers)
        finally:
            for answers in running:
                self._ray.cancel(answers)

    def _ask(self, worker: _Worker, batches: list[int]) -> Any:
        return worker.actor.score.options(num_returns="streaming").remote(list(worker.left), batches)

    def _ask_all(self, question: str) -> Iterator[Any]:
        """What each worker gives for a method of `Share`; all are at it at the same time."""
        asked = [getattr(worker.actor, question).remote() for worker in self._workers]
        for worker, answer in zip(self._workers, asked, strict=True):
            yield self._answer_of(worker, question, answer)

    def _answer_of(self, worker: _Worker, question: str, answer: Any) -> Any:
        while True:
            try:
                while not self._ray.wait([answer], timeout=1)[0]:
                    pass
                return self._get(answer)
            except self._lost:
                self._renew(worker)
                answer = getattr(worker.actor, question).remote()

    def _get(self, answer: Any) -> Any:
        try:
            return self._ray.get(answer)
        except SurgeryError as error:  # as Ray tells it, with the worker's traceback
            raise SurgeryError(f"A worker of the search failed: {getattr(error, 'cause', error)}") from error

    def _replace(self, worker: _Worker) -> None:
        """Have another worker take a share over, with the base's hidden states of it."""
        self._renew(worker)
        _, passes = self._answer_of(worker, "base", worker.actor.base.remote())
        self.layer_passes += passes

    def _renew(self, worker: _Worker) -> None:
        worker.retries += 1
        if worker.retries > _MAX_RETRIES:
            raise SurgeryError(
                f"A worker of {len(worker.batches)} batches was lost {worker.retries} times in a row. See whether its "
                "machine has memory enough, and run the same command again: what is known is kept."
            )
        self._say(f"A worker was lost; another takes its questions over ({worker.retries} of {_MAX_RETRIES} retries)")
        worker.actor = self._make(worker.batches)


def share_out(setup: Setup, workers: int) -> list[list[int]]:
    """The batches in as many shares, none of them empty, of about as many tokens each."""
    batches = setup.questions.batches
    shares: list[list[int]] = [[] for _ in range(min(workers, len(batches)))]
    tokens = [0] * len(shares)
    # The largest first, each to who has least so far.
    for number in sorted(range(len(batches)), key=lambda number: (-batches[number].inputs.numel(), number)):
        least = tokens.index(min(tokens))
        shares[least].append(number)
        tokens[least] += batches[number].inputs.numel()
    return [sorted(share) for share in shares]


@contextlib.contextmanager
def remote_scorer(
    address: str, cpus: int, device: str | None, say: Callable[[str], None] = print
) -> Iterator[tuple[Callable[[Setup], RemoteScorer], str]]:
    """Be part of a cluster; gives what makes a scorer on it, and the kind of device that it scores on.

    Args:
        address: as `ray_jobs.cluster` takes it.
        cpus: of each worker, also its number of threads.
        device: as `RayRunner` has it.
        say: told when a worker is lost.

    Raises:
        SurgeryError: as `ray_jobs.cluster`, and if no machine is large enough for a worker.
    """
    with cluster(address) as ray:
        gpus = gpus_per_job(ray, device)
        check_size(ray, cpus, gpus)
        room = ray.cluster_resources()["GPU" if gpus else "CPU"] // (1 if gpus else cpus)
        variables = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
        paths = [_PACKAGE_ROOT, *filter(None, [variables.get("PYTHONPATH")])]
        variables |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(cpus)}
        worker = ray.remote(Share).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, runtime_env={"env_vars": variables}
        )

        def make_scorer(setup: Setup) -> RemoteScorer:
            def make(batches: list[int]) -> Any:
                return worker.remote(setup.spec, os.getcwd(), cpus, batches)

            return RemoteScorer(ray, setup, max(1, int(room)), make, say)

        yield make_scorer, "cuda" if gpus else "cpu"
