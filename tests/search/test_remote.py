"""Scoring on a Ray cluster: batches and shards. tests/jobs/test_ray_jobs.py looks at what a cluster finds."""

from model_preparation.jobs.ray_scoring import shards
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.settings import SearchSettings


def test_batches_are_those_of_the_workers_device_whatever_is_here(base_dir, layers_dir, task_dir):
    settings = SearchSettings(".", str(base_dir), llama_layers_dir=layers_dir, tasks=(str(task_dir),))
    here, there = ScoringSetup(settings), ScoringSetup(settings, scored_on="cuda")
    assert there.recorded["device"] == "cuda"
    assert len(there.questions.batches) < len(here.questions.batches)  # a GPU takes more at once
    assert there.pair.model.device.type == "cpu"


def test_the_shards_are_all_batches_once_and_about_alike(loaded):
    batches = loaded.questions.batches
    for workers in (1, 2, 5, len(batches) + 3):
        found = shards(batches, workers)
        assert sorted(number for shard in found for number in shard) == list(range(len(batches)))
        assert len(found) == min(workers, len(batches))
        sizes = [sum(batches[number].inputs.numel() for number in shard) for shard in found]
        assert max(sizes) - min(sizes) <= max(batch.inputs.numel() for batch in batches)
