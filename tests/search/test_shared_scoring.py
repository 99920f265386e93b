"""Scores from shared hidden states are those of the checkpoint that is really built and evaluated, to the bit."""

import itertools
import json

import pytest
import torch
from transformers import LlamaForCausalLM

from model_preparation import build_checkpoint, evaluate_checkpoint, load_checkpoint
from model_preparation.search.layer_sets import count_passes

ALL_SETS = [layers for size in (1, 2, 3, 4) for layers in itertools.combinations(range(4), size)]


@pytest.fixture(scope="module")
def evaluated(base_dir, layers_dir, task_dir, tmp_path_factory):
    """For some sets, what evaluate_checkpoint says of the checkpoint built of them: (result, answers by task)."""
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patched.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "a machine")
        for layers in ((0,), (3,), (1, 2), (0, 2, 3), (0, 1, 2, 3)):
            folder = tmp_path_factory.mktemp("checkpoint") / "graft"
            build_checkpoint(str(base_dir), list(layers), layers_dir, folder)
            result = evaluate_checkpoint(folder, tasks=[str(task_dir)], batch_size=3)
            found[layers] = result, records_of(folder)
    return found


def records_of(checkpoint):
    """The answers of its evaluation, by task."""
    records = [json.loads(path.read_text()) for path in checkpoint.glob("evaluations/*/answers/*.json")]
    return {record["task"]: record["answers"] for record in records}


def assert_answers_are(records, questions, results):
    """`records` has the answers of an evaluation, by task."""
    answers = {name: [None] * len(given) for name, given in records.items()}
    names = [task.name for task in questions._tasks]
    for number, result in results.items():
        for request, answer in result.answers:
            answers[names[questions.batches[number].task]][request] = list(answer)
    assert answers == records


@pytest.mark.parametrize("memory_bytes", [1 << 30, 0, 5000])
def test_every_answer_is_that_of_the_checkpoint_to_the_bit(loaded, make_scorer, evaluated, memory_bytes, tmp_path):
    questions, scorer = loaded.questions, make_scorer(memory_bytes=memory_bytes)
    scorer.base()
    results = dict(scorer.score(ALL_SETS))
    assert sorted(results) == sorted(ALL_SETS)
    for layers, (evaluation, records) in evaluated.items():
        assert_answers_are(records, questions, results[layers])
        values = questions.values(results[layers])
        assert sum(values.values()) == pytest.approx(
            sum(row["score"] * row["questions"] for row in evaluation["tasks"].values())
        )
        assert len(values) == evaluation["questions"] == 20
    assert list(tmp_path.iterdir()) == []
    assert any(questions.prefixes)
    assert not all(questions.prefixes)
    assert scorer.layer_passes == pytest.approx(count_passes(ALL_SETS, 4))


def test_the_divergence_is_that_of_whole_forward_passes(loaded, make_scorer, base_dir, layers_dir, donor_dir, tmp_path):
    """Each row's tokens run as a whole, in the built checkpoint and in the donor, each with its own embedding."""
    build_checkpoint(str(base_dir), [1, 2], layers_dir, tmp_path / "graft")
    ((_, results),) = make_scorer(objective="kl").score([(1, 2)])
    assert_divergences_are(loaded.questions, results, tmp_path / "graft", donor_dir)


def assert_divergences_are(questions, results, checkpoint, donor_dir):
    """`results` has the divergences between the checkpoint and the donor."""
    graft, _ = load_checkpoint(checkpoint)
    donor = LlamaForCausalLM.from_pretrained(donor_dir).eval()

    @torch.no_grad()
    def log_probabilities(model, row):
        return model(torch.tensor([row.tokens])).logits[0, -row.scored :].double().log_softmax(-1)

    for number, batch in enumerate(questions.batches):
        for row, found in zip(batch.rows, results[number].divergences, strict=True):
            ours, donors = log_probabilities(graft, row), log_probabilities(donor, row)
            wanted = torch.nn.functional.kl_div(ours, donors, log_target=True, reduction="sum") / row.scored
            assert found == pytest.approx(float(wanted), rel=1e-4, abs=1e-5)
    assert len(questions.divergences(results)) == 20


def test_after_the_last_mixing_only_scored_positions_go_on(loaded, make_scorer):
    pair, questions, scorer = loaded.pair, loaded.questions, make_scorer()
    dict(scorer.score([(3,)]))  # the first run computes all positions too, and compares
    rows = []
    hook = pair.layer(3, (3,)).mlp.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[:-1].numel()))
    dict(scorer.score([(3,)]))
    hook.remove()
    scored = sum(batch.positions.numel() for batch in questions.batches)
    prefixes = sum(map(len, questions.prefixes))
    assert len(questions.batches) > 5
    assert scored <= sum(rows) - prefixes <= scored + 16 * len(questions.batches)
    assert sum(rows) < sum(batch.inputs.numel() for batch in questions.batches)
