"""The device a command runs on: flags, what Ray or a launcher gives, and the line that says the device.

No GPU is needed: a stand-in answers for torch.cuda as on a machine with two GPUs.
"""

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from model_preparation.devices import choose_device
from model_preparation.errors import SurgeryError
from model_preparation.jobs import ray_gpus, ray_jobs, ray_scoring
from model_preparation.jobs.jobs import Job
from model_preparation.search.settings import SearchSettings
from model_preparation.train.heal.settings import HealSettings
from model_preparation.train.heal.step_size import StepSize
from model_preparation.train.heal.training_arguments import training_arguments


@pytest.fixture
def two_gpus(monkeypatch):
    """Torch sees two GPUs, or those in CUDA_VISIBLE_DEVICES. The value: the devices that torch was set to."""
    chosen: list[torch.device] = []
    empty = torch.empty

    def count() -> int:
        return len([each for each in os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",") if each])

    def empty_there(*size, device=None, **options):
        place = torch.device("cpu" if device is None else device)
        if place.type == "cuda" and (place.index or 0) >= count():
            raise RuntimeError("CUDA error: invalid device ordinal")
        return empty(*size, device="cpu" if place.type == "cuda" else place, **options)

    monkeypatch.setattr(torch, "empty", empty_there)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count() > 0)
    monkeypatch.setattr(torch.cuda, "device_count", count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: f"GPU number {place.index}")
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: chosen.append(torch.device(place)))
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "WORLD_SIZE", "RANK", "MODEL_PREPARATION_DEVICE"):
        monkeypatch.delenv(name, raising=False)
    return chosen


@pytest.mark.parametrize(
    ("environment", "flags", "device", "told"),
    [
        ({}, {}, "cuda:0", "cuda:0 (GPU number 0)"),
        ({}, {"gpu": 1}, "cuda:1", "cuda:1 (GPU number 1)"),
        ({}, {"device": "cuda"}, "cuda:0", "cuda:0 (GPU number 0)"),
        ({}, {"device": "cuda:1"}, "cuda:1", "cuda:1 (GPU number 1)"),
        ({}, {"device": "cpu:0"}, "cpu", "cpu"),
        ({"CUDA_VISIBLE_DEVICES": ""}, {}, "cpu", "cpu (torch sees no CUDA device)"),
        # A Ray job sees only its own GPU. A Ray job for the CPU must not use the GPUs that it sees.
        ({"MODEL_PREPARATION_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": "1"}, {}, "cuda:0", "cuda:0 (GPU number 0)"),
        ({"MODEL_PREPARATION_DEVICE": "cpu"}, {}, "cpu", "cpu"),
        # torchrun and accelerate: a GPU for each process. Only the first process prints the line.
        (
            {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "RANK": "0"},
            {},
            "cuda:0",
            "cuda:0 (GPU number 0), a GPU for each of 2 processes",
        ),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1", "RANK": "1"}, {"device": "cuda"}, "cuda:1", None),
    ],
)
def test_the_device_is_chosen_and_told_once(two_gpus, monkeypatch, capsys, environment, flags, device, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_device(**flags) == device
    assert capsys.readouterr().out == ("" if told is None else f"Device       {told}\n")


@pytest.mark.parametrize(
    ("environment", "flags", "words"),
    [
        ({}, {"gpu": 2}, "GPU 2 does not exist: torch sees CUDA devices 0 to 1 here"),
        ({}, {"device": "cuda:7"}, "--device cuda:7 cannot be used here: CUDA error: invalid device ordinal"),
        # Ray gave the job a GPU, but torch cannot use it. The job must not go on with the CPU in silence.
        ({"MODEL_PREPARATION_DEVICE": "cuda", "CUDA_VISIBLE_DEVICES": ""}, {}, "--device cuda cannot be used here"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {"gpu": 0}, "gives each of its 2 processes a GPU"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, {"device": "cuda:0"}, "gives each of its 2 processes a GPU"),
    ],
)
def test_a_device_that_cannot_be_had_is_refused(two_gpus, monkeypatch, environment, flags, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SurgeryError, match=words):
        choose_device(**flags)


@pytest.mark.parametrize(("asked", "found"), [("cuda", "cuda:0"), ("cpu", "cpu")])
def test_a_worker_of_a_search_computes_where_the_search_says(two_gpus, monkeypatch, tmp_path, asked, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # as Ray sets it
    monkeypatch.chdir(tmp_path)
    made = []
    scorer = SimpleNamespace(base=dict, layer_passes=0.0)
    monkeypatch.setattr(ray_scoring, "ScoringSetup", made.append)
    monkeypatch.setattr(ray_scoring, "SharedScorer", lambda setup, chosen: scorer)
    next(ray_scoring.QuestionShard(SearchSettings(tmp_path, device=asked), str(tmp_path), 1, [0]).base())
    assert [each.device for each in made] == [found]


@pytest.mark.parametrize(
    ("gpus", "device", "found", "told"),
    [
        (2, None, 1, "a GPU from Ray for each job"),
        (2, "cuda", 1, "a GPU from Ray for each job"),
        (2, "cpu", 0, "the CPU for each job"),
        (0, None, 0, "the CPU for each job (the Ray cluster has no GPU)"),
    ],
)
def test_the_jobs_of_a_cluster_are_given_what_the_flag_says(capsys, tmp_path, gpus, device, found, told):
    resources = {"CPU": 4, **({"GPU": gpus} if gpus else {})}
    machine = {"Alive": True, "Resources": resources}
    cluster = SimpleNamespace(cluster_resources=lambda: resources, nodes=lambda: [machine])
    assert ray_gpus.gpus_per_job(cluster, device, 1) == found
    assert capsys.readouterr().out == f"Device       {told}\n"
    order = ray_jobs._order(Job("name", tmp_path / "script.py", ()), {}, with_gpu=found > 0)
    assert order.launch.variables["MODEL_PREPARATION_DEVICE"] == ("cuda" if found else "cpu")


def test_a_gpu_that_the_cluster_lacks_is_refused():
    cluster = SimpleNamespace(cluster_resources=lambda: {"CPU": 4})
    with pytest.raises(SurgeryError, match="--device cuda is given, but the Ray cluster has no GPU"):
        ray_gpus.gpus_per_job(cluster, "cuda", 1)


def test_jobs_that_no_machine_can_take_are_refused():
    machine = {"Alive": True, "Resources": {"CPU": 4}}
    cluster = SimpleNamespace(cluster_resources=lambda: {"CPU": 8}, nodes=lambda: [machine, machine])
    with pytest.raises(SurgeryError, match=r"needs 5 CPUs and 0 GPUs of one machine.*Give a smaller --cpus_per_job"):
        ray_gpus.gpus_per_job(cluster, None, 5)


@pytest.fixture
def no_accelerate_state():
    """Clear accelerate's state, so that processes forked by later tests do not inherit it."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_healing_runs_on_the_gpu_that_was_named(two_gpus, no_accelerate_state, tmp_path):
    size = StepSize(accumulation=1, sequences=4, sequences_at_start=4)
    args = training_arguments(HealSettings(), tmp_path, "run", size, 1, "cuda:1", resumed=False)
    assert args.device == torch.device("cuda:1")
    assert two_gpus[-1] == torch.device("cuda:1")
    assert args.n_gpu == 1
    with pytest.raises(SurgeryError, match="would run on cuda, not on --device mps"):
        training_arguments(HealSettings(), tmp_path, "run", size, 1, "mps", resumed=False)
