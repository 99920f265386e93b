"""compare_checkpoints.py on evaluations that stock lm-eval made: its numbers, its files, and what it refuses."""

import json
import math
import shutil
from collections import Counter

import pytest
from PIL import Image

from model_preparation.errors import SurgeryError
from model_preparation.evaluation.compare.compare import compare_evaluations
from model_preparation.evaluation.compare.examples import differing_questions
from model_preparation.evaluation.compare.report import write_report
from model_preparation.io.self_checksum import with_checksum
from tests.conftest import assert_refused, run_command
from tests.evaluation.compare.stock import (
    GROUPS,
    QUESTIONS,
    change_samples,
    evaluate,
    results_of,
    samples_of,
    write_tasks,
)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("quiz") / "tasks")


@pytest.fixture(scope="module")
def stock(tasks, tmp_path_factory):
    """Evaluations: `one`, `two` of `quiz`; `nature`, `letters` of its groups. Copy them to change them."""
    folder = tmp_path_factory.mktemp("stock")
    evaluate(tasks, folder / "one", seed=1)
    evaluate(tasks, folder / "two", seed=2)
    evaluate(tasks, folder / "nature", seed=3, task="quiz_nature")
    evaluate(tasks, folder / "letters", seed=4, task="quiz_letters")
    return folder


@pytest.fixture
def copy(stock, tmp_path):
    """The same in a folder of the test's own."""
    shutil.copytree(stock, tmp_path / "copy")
    return tmp_path / "copy"


def compare(folder, *names, **options):
    return compare_evaluations([folder / name for name in names or ("one", "two")], resamples=200, **options)


def row_of(comparison, name):
    return next(row for row in comparison.rows if row.name == name)


def the_only(folder, pattern):
    (path,) = folder.glob(f"**/{pattern}")
    return path


def mcnemar(gained, lost):
    tosses = gained + lost
    uneven = [heads for heads in range(tosses + 1) if abs(2 * heads - tosses) >= abs(gained - lost)]
    return sum(math.comb(tosses, heads) for heads in uneven) / 2**tosses


@pytest.fixture(scope="module")
def report(stock, tmp_path_factory):
    """The command's result and its folder."""
    folder = tmp_path_factory.mktemp("reports") / "comparison_report"
    result = run_command(
        "compare_checkpoints", stock / "one", stock / "two", "--json", "--subjects", cwd=folder.parent, COLUMNS="100"
    )
    return result, folder


def test_the_command_leaves_a_report_and_says_where(report):
    result, folder = report
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "Report (comparison.html) and plots are in comparison_report"
    names = {"comparison.html", "comparison.json", "accuracy_by_subject.png", "gain_by_subject.png"}
    assert {path.name for path in folder.iterdir()} == names
    for name in ("accuracy_by_subject.png", "gain_by_subject.png"):
        colours = Image.open(folder / name).convert("RGB").getcolors(1 << 20)
        assert max(count for count, _ in colours) < 0.99 * sum(count for count, _ in colours)
    for words in ("quiz", "nature", "plants", "A  one", "B  two", "4 differences", "Holm"):
        assert words in result.stdout


def test_the_numbers_are_lm_evals_and_those_counted_by_hand(stock, report):
    numbers = json.loads((report[1] / "comparison.json").read_text())
    rows = {row["name"]: row for row in numbers["rows"]}
    assert [row["kind"] for row in numbers["rows"]] == ["overall"] + ["group"] * 2 + ["subject"] * 4
    assert rows["quiz_poems"]["group"] == "letters"
    members = {**GROUPS, "quiz": list(QUESTIONS), **{f"quiz_{subject}": [subject] for subject in QUESTIONS}}
    for name, row in rows.items():
        pairs = [
            (one["acc"], two["acc"])
            for subject in members[name]
            for one, two in zip(samples_of(stock / "one", subject), samples_of(stock / "two", subject), strict=True)
        ]
        assert row["questions"] == len(pairs)
        for model, score in zip(("one", "two"), row["scores"], strict=True):
            official = results_of(stock / model)["results"][name]
            assert score["mean"] == pytest.approx(official["acc,none"])
            assert score["stderr"] == pytest.approx(official["acc_stderr,none"])
        counts = Counter(pairs)
        (difference,) = row["differences"]
        assert (difference["gained"], difference["lost"]) == (counts[0.0, 1.0], counts[1.0, 0.0])
        assert difference["p_value"] == pytest.approx(mcnemar(counts[0.0, 1.0], counts[1.0, 0.0]))
        assert difference["difference"] == pytest.approx(sum(two - one for one, two in pairs) / len(pairs))
        low, high = difference["interval"]
        assert low <= difference["difference"] <= high
    assert [rows[name]["differences"][0]["tests"] for name in ("quiz", "quiz_nature", "quiz_poems")] == [1, 2, 4]
    assert numbers["notes"] == []


def test_one_line_says_what_was_asked_and_a_longer_limit_of_prompts_is_no_remark(copy):
    for name, limit in (("one", 1 << 60), ("two", 512)):
        path = the_only(copy, f"{name}/**/results_*.json")
        found = json.loads(path.read_text()) | {"lm_eval_version": "0.4.13", "max_length": limit}
        path.rename(path.with_name("results_2026-03-04T05-06-07.8.json")).write_text(json.dumps(found))
        for samples in copy.glob(f"{name}/**/samples_*.jsonl"):
            samples.rename(samples.with_name(f"{samples.name.rpartition('_')[0]}_2026-03-04T05-06-07.8.jsonl"))
    comparison = compare(copy)
    assert comparison.notes == []
    write_report(comparison, copy / "report", questions=0, as_json=False, overwrite=False)
    page = (copy / "report" / "comparison.html").read_text()
    assert '<p class="head">quiz · acc · 34 questions · 0-shot · no limit · lm-eval 0.4.13 · 2026-03-04</p>' in page
    scores = Counter(f"{each.mean:.3f} ± {each.stderr:.3f}" for row in comparison.rows for each in row.scores)
    assert {text: page.count(text) for text in scores} == scores  # each is there once


def write_cost(root, weights, *, contexts, on="a chip, 1 thread", token_seconds=0.025):
    """What --efficiency leaves in the folder of a model's results."""
    row = {"first_token_seconds": 0.5, "token_seconds": token_seconds, "peak_memory_bytes": 9e8}
    rows = [{**row, "context": context, "cache_bytes": 1000 * context} for context in contexts]
    models = [{"weights": each, "dtype": "float32", "contexts": rows} for each in weights]
    (root / "efficiency").mkdir()
    found = {"models": models, "measured_on": on, "date": "2026-01-01"}
    (root / "efficiency" / "efficiency.json").write_text(json.dumps(found))


def test_scores_stand_against_costs_of_the_same_weights(copy, tmp_path):
    for name in ("one", "two", "nature"):  # as in a --results_dir
        model = with_checksum({"settings": {}, "weights": "of all", "model": {"weights": name}})
        the_only(copy, f"{name}/**/results_*.json").parents[1].joinpath("settings.json").write_bytes(model)
    write_cost(copy / "one", ["one", "elsewhere"], contexts=(512, 2048, 4096))
    write_cost(copy / "two", ["two"], contexts=(512, 2048))
    result = run_command("compare_checkpoints", copy / "one", copy / "two", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    words = "time per token 25.00 ms, cache 2.05 MB, peak memory 900.00 MB after 2,048 tokens"
    assert " ".join(result.stdout.split()).count(words) == 2
    folder = tmp_path / "comparison_report"
    page = (folder / "comparison.html").read_text()
    assert "Costs are for one sequence after 2,048 tokens, measured on a chip, 1 thread, float32." in page
    assert page.count('<td data-value="2048000">2.05</td>') == 2
    assert len(Image.open(folder / "score_by_cost.png").convert("RGB").getcolors(1 << 20)) > 10
    found = json.loads((folder / "comparison.json").read_text())
    assert [model["cost"]["values"]["cache_bytes"] for model in found["models"]] == [2_048_000] * 2
    scores = {
        model["name"]: each["mean"] for model, each in zip(found["models"], found["rows"][0]["scores"], strict=True)
    }
    worse, better = sorted(scores, key=scores.get)
    assert found["fronts"] == {"token_seconds": [better], "cache_bytes": [better]}  # the costs are the same

    path = copy / worse / "efficiency" / "efficiency.json"
    shutil.rmtree(path.parent)
    write_cost(copy / worse, [worse], contexts=(2048,), token_seconds=0.02)  # less time, as large a cache
    faster = compare(copy)
    assert faster.fronts == {"token_seconds": [worse, better], "cache_bytes": [better]}
    write_report(faster, folder, questions=0, as_json=False, overwrite=True)
    words = f"Pareto front of score and time per token: {worse}, {better}; of score and cache: {better}. Every other"
    assert words in (folder / "comparison.html").read_text()
    path = copy / "two" / "efficiency" / "efficiency.json"
    path.write_text(path.read_text().replace("a chip", "another"))
    (note,) = compare(copy).notes
    assert note.startswith("Costs were measured in different ways: one on a chip, 1 thread, float32; two on another")
    path.write_text(path.read_text().replace("two", "other weights"))
    assert [model.cost is None for model in compare(copy).models] == [False, True]
    path.write_text("{}")
    with pytest.raises(SurgeryError, match=f"{path} is not a measurement of this program .*measure again"):
        compare(copy)


def test_the_verdict_is_a_sentence(stock, report):
    row = row_of(compare(stock), "quiz")
    new, old = row.scores[1].mean, row.scores[0].mean
    text = " ".join(report[0].stdout.split())
    assert f"two against one: {new:.3f} against {old:.3f} on 34 common questions: difference" in text
    assert "not distinguishable" in text


def test_the_same_seed_gives_the_same_intervals_and_another_seed_others(stock):
    intervals = [[row.differences[0].interval for row in compare(stock, seed=seed).rows] for seed in (1, 1, 2)]
    assert intervals[0] == intervals[1] != intervals[2]


def test_a_real_difference_is_called_one_and_in_the_right_direction(copy):
    change_samples(copy / "one", lambda sample: sample.update(acc=0.0))
    change_samples(copy / "two", lambda sample: sample.update(acc=1.0))
    better, worse = compare(copy, "one", "two"), compare(copy, "two", "one")
    assert row_of(better, "quiz").differences[0].verdict == "better"
    assert row_of(worse, "quiz").differences[0].verdict == "worse"
    assert row_of(better, "quiz").differences[0].p_value == pytest.approx(2 / 2**34)
    # Even for 5 of 5 questions, p is 0.0625 before Holm's adjustment.
    assert row_of(better, "quiz_grammar").differences[0].verdict == "not distinguishable"
    # Samples and results do not belong together any more, and that is said.
    assert any("lm-eval's own score of quiz is" in note for note in better.notes)


def test_a_model_is_as_good_as_its_copy(copy):
    shutil.copytree(copy / "one", copy / "same")
    difference = row_of(compare(copy, "one", "same"), "quiz").differences[0]
    assert (difference.difference, difference.interval, difference.p_value) == (0.0, (0.0, 0.0), 1.0)
    assert difference.verdict == "not distinguishable"


def test_the_common_questions_are_compared_and_what_differs_is_said(tasks, stock, tmp_path):
    evaluate(tasks, tmp_path / "short", seed=3, limit=4, num_fewshot=1)
    comparison = compare_evaluations([stock / "one", tmp_path / "short"], resamples=200)
    assert row_of(comparison, "quiz").questions == 16
    first = [sample["acc"] for subject in QUESTIONS for sample in samples_of(stock / "one", subject)[:4]]
    assert row_of(comparison, "quiz").scores[0].mean == pytest.approx(sum(first) / 16)
    notes = "\n".join(comparison.notes)
    assert "Only the 16 common questions are compared. In these tasks, one has 34, short has 16." in notes
    assert "The prompts differ in 16 of the 16 common questions." in notes
    assert "Different limit of questions per task: none for one, 4 for short." in notes
    assert "Different number of examples before each question: 0 for one, 1 for short." in notes


def test_one_question_per_subject_has_a_test_but_no_interval(tasks, stock, tmp_path):
    evaluate(tasks, tmp_path / "short", seed=3, limit=1)
    result = run_command("compare_checkpoints", stock / "one", tmp_path / "short", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no interval (a single question in a subject)" in " ".join(result.stdout.split())
    row = json.loads((tmp_path / "comparison_report" / "comparison.json").read_text())["rows"][0]
    assert (row["questions"], row["differences"][0]["interval"], row["scores"][0]["stderr"]) == (4, None, None)
    assert row["differences"][0]["p_value"] is not None


def test_a_subject_that_one_lacks_is_left_out_and_named(stock):
    comparison = compare(stock, "one", "letters")
    assert [row.name for row in comparison.rows] == ["quiz_letters", "quiz_grammar", "quiz_poems"]
    assert "Tasks left out, because not every evaluation has them: quiz_animals, quiz_plants." in comparison.notes


def test_a_group_of_which_a_subject_is_missing_says_so(copy):
    path = the_only(copy, "two/**/results_*.json")
    results = json.loads(path.read_text())
    del results["configs"]["quiz_plants"]
    path.write_text(json.dumps(results))
    comparison = compare(copy)
    labels = [row.label for row in comparison.rows]
    assert labels == ["quiz (part)", "nature (part)", "letters", "animals", "grammar", "poems"]
    assert [row.group for row in comparison.rows[3:]] == ["nature (part)", "letters", "letters"]
    assert comparison.rows[0].questions == 21


def test_one_task_alone(stock):
    comparison = compare(stock, task="quiz_poems")
    assert [(row.kind, row.name, row.label) for row in comparison.rows] == [("overall", "quiz_poems", "poems")]
    comparison = compare(stock, task="quiz_nature")
    assert [row.name for row in comparison.rows] == ["quiz_nature", "quiz_animals", "quiz_plants"]


def test_three_models_and_another_baseline(copy, tmp_path):
    shutil.copytree(copy / "one", copy / "three")
    folders = [copy / name for name in ("one", "two", "three")]
    result = run_command("compare_checkpoints", *folders, "--baseline", copy / "two", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "comparison_report" / "comparison.json").read_text())
    assert [model["name"] for model in numbers["models"]] == ["two", "one", "three"]
    one, three = numbers["rows"][0]["differences"]
    assert (one["tests"], one["interval"]) == (2, three["interval"])
    assert one["p_adjusted"] == pytest.approx(min(1, 2 * one["p_value"]))


def test_rows_of_two_copies_of_the_data_are_matched_by_their_prompts(copy):
    # A copy of the data set with another column would give such hashes.
    change_samples(copy / "two", lambda sample: sample.update(doc_hash="other" + sample["doc_hash"]))
    comparison = compare(copy)
    assert row_of(comparison, "quiz").questions == 34
    assert any("matched by their prompts and targets" in note for note in comparison.notes)


def test_the_questions_shown_are_those_on_which_the_models_are_furthest_apart(stock):
    def share(sample):
        weights = [math.exp(float(score)) for score, _ in sample["filtered_resps"]]
        return weights[sample["doc"]["answer"]] / sum(weights)

    def choice(sample):
        return "ABCD"[max(range(4), key=lambda option: float(sample["filtered_resps"][option][0]))]

    pairs = [
        pair
        for subject in QUESTIONS
        for pair in zip(samples_of(stock / "one", subject), samples_of(stock / "two", subject), strict=True)
    ]
    gained = [(one, two) for one, two in pairs if (one["acc"], two["acc"]) == (0.0, 1.0)]
    gained.sort(key=lambda pair: share(pair[0]) - share(pair[1]))
    assert len(gained) > 3

    higher, lower = differing_questions(compare(stock), 1, 3)

    assert len(higher) == len(lower) == 3
    for example, (one, two) in zip(higher, gained, strict=False):
        assert example.title == " ".join(one["doc"]["question"].split())
        assert f"question: {one['doc']['question']}" in example.text
        assert f"A. {one['doc']['choices'][0]}" in example.text
        assert example.target == "ABCD"[one["doc"]["answer"]]
        assert example.answers[0].startswith(f"{choice(one)} (")
        assert example.answers[1] == f"{example.target} ({share(two):.0%})"
    assert [example.values for example in lower] == [(1.0, 0.0)] * 3


def test_a_long_example_has_its_beginning_and_its_end_where_recall_tasks_ask(copy):
    """The question of a recall task is at the end of its text."""

    def lengthen(sample):
        sample["doc"] = {"input": f"Remember this. {'The grass is green. ' * 400}What is it?"}
        sample["target"] = ["red", "blue"]

    change_samples(copy / "one", lengthen)
    (example,) = differing_questions(compare(copy), 1, 1)[0]
    for text in (example.title, example.text):
        assert "Remember this. The grass" in text
        assert text.endswith("green. What is it?")
        assert len(text) < 2_000
    assert example.target == "red, blue"


def test_numbers_that_are_not_0_or_1_have_an_interval_alone(copy):
    for name, gain in (("one", 0.0), ("two", 0.25)):
        change_samples(copy / name, lambda sample, gain=gain: _set_f1(sample, gain))
    comparison = compare(copy, metric="f1")
    difference = row_of(comparison, "quiz").differences[0]
    assert not comparison.binary
    assert difference.difference == pytest.approx(0.25)
    assert difference.interval == pytest.approx((0.25, 0.25))
    assert (difference.p_value, difference.gained, difference.verdict) == (None, None, "better")


def _set_f1(sample, gain):
    sample.update(f1=sample["doc_id"] / 20 + gain, metrics=[*sample["metrics"], "f1"])


def test_of_several_filters_the_one_named_is_taken(copy):
    for path in copy.glob("**/samples_*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        lines += [{**line, "filter": "strict", "acc": 1.0 - line["acc"]} for line in lines]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    plain, strict = compare(copy), compare(copy, metric="acc,strict")
    assert row_of(plain, "quiz").questions == row_of(strict, "quiz").questions == 34
    assert row_of(strict, "quiz").scores[0].mean == pytest.approx(1 - row_of(plain, "quiz").scores[0].mean)


def test_the_newest_evaluation_with_all_its_files_counts(copy):
    shutil.copytree(copy / "letters", copy / "one", dirs_exist_ok=True)  # both have a subfolder `a model`
    assert row_of(compare(copy), "quiz_letters").questions == 14
    newest = max(copy.glob("one/**/results_*.json"))
    max(copy.glob("one/**/samples_quiz_poems_*.jsonl")).unlink()
    comparison = compare(copy)
    assert row_of(comparison, "quiz").questions == 34
    assert any(f"the newer {newest.name} lacks samples files" in note for note in comparison.notes)
    with pytest.raises(SurgeryError, match=r"lacks samples files, such as samples_quiz_poems_.*log_samples"):
        compare_evaluations([newest, copy / "two"])


def checkpoint(folder, layers):
    """As much of a checkpoint as a comparison reads."""
    info = {"format_version": 1, "replaced_layers": layers, "total_layers": 4, "config": {}, "generation_config": {}}
    folder.mkdir(parents=True)
    (folder / "checkpoint_info.json").write_text(json.dumps({**info, "files": {}}))
    return folder


def test_checkpoints_are_known_by_name_and_layers_and_compared_by_the_settings_they_share(stock, tmp_path):
    one, two = checkpoint(tmp_path / "a" / "best", [1, 3]), checkpoint(tmp_path / "b" / "best", [])
    for folder, digest in ((one, "mmlu-aa"), (one, "mmlu-bb"), (two, "mmlu-bb")):
        shutil.copytree(stock / "one", folder / "evaluations" / digest)
    result = run_command("compare_checkpoints", one, two, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "A  a/best (layers 1 3 replaced)" in result.stdout
    assert "B  b/best (layers none replaced)" in result.stdout

    shutil.copytree(stock / "one", two / "evaluations" / "mmlu-aa")
    with pytest.raises(SurgeryError, match=r"best has 2 evaluations: mmlu-aa \(quiz, 0-shot\); .*--task"):
        compare_evaluations([one, two])
    compare_evaluations([one, two], task="mmlu-aa", resamples=200)
    with pytest.raises(SurgeryError, match="no finished evaluation of 'gsm8k'"):
        compare_evaluations([one, two], task="gsm8k")
    # For two evaluations of one checkpoint, the names are those of the evaluations.
    both = compare_evaluations([one / "evaluations" / "mmlu-aa", one / "evaluations" / "mmlu-bb"], resamples=200)
    assert [model.name for model in both.models] == ["mmlu-aa", "mmlu-bb"]
    assert both.models[0].layers == [1, 3]


def test_an_evaluation_that_is_not_finished_names_the_command_that_goes_on(stock, tmp_path):
    begun, never = checkpoint(tmp_path / "begun", [1]), checkpoint(tmp_path / "never", [1])
    unfinished = begun / "evaluations" / "mmlu-aa"
    unfinished.mkdir(parents=True)
    (unfinished / "mmlu_anatomy.json").write_text("{}")
    command = f"python test_checkpoint.py --checkpoint {begun} --full_eval"
    result = run_command("compare_checkpoints", begun, stock / "one", cwd=tmp_path)
    assert_refused(result, "mmlu-aa has no results_<date>.json yet", command, "flags it was begun with")
    with pytest.raises(SurgeryError, match=f"Continue it by {command}"):
        compare_evaluations([stock / "one", unfinished])
    with pytest.raises(SurgeryError, match=r"has not been evaluated\. Run python test_checkpoint\.py"):
        compare_evaluations([stock / "one", never])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SurgeryError, match=r"no evaluation was finished there.*--output_path .*empty --log_samples"):
        compare_evaluations([stock / "one", tmp_path / "empty"])


def test_damaged_samples_are_told_by_file_and_line(copy, tmp_path):
    path = the_only(copy, "two/**/samples_quiz_poems_*.jsonl")
    whole = path.read_text()
    path.write_text(whole[:-40])
    result = run_command("compare_checkpoints", copy / "one", copy / "two", cwd=tmp_path)
    assert_refused(result, f"{path}, line 9, is cut off", "Run the evaluation again")
    assert not (tmp_path / "comparison_report").exists()
    for damaged, words in (
        (whole.replace("doc_hash", "hash", 1), "line 1, has no doc_hash"),
        (whole.replace('"acc": 0.0', '"acc": NaN', 1), "has nan for acc"),
        (whole.replace('"acc": 0.0', '"acc": [0, 1]', 1), r"has \[0, 1\] for acc"),
        (whole.replace("\n", "\n[]\n", 1), "line 2, is damaged: it is not a sample"),
        (whole[: whole.rindex("\n", 0, -1) + 1], r"has 8 questions, but .* has 9"),
        (whole * 2, "has 18 questions"),
        (whole.replace('"acc": 0.0', f'"acc": {10**400}', 1), "line 1, is damaged: "),
        ("", "is empty"),
    ):
        assert damaged != whole
        path.write_text(damaged)
        with pytest.raises(SurgeryError, match=words):
            compare(copy)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not a whole results file"),
        ("[]", "not a whole results file"),
        ('{"results": [], "configs": {}}', r"results is \[\]"),
        ('{"configs": {"../up": {}}}', "'../up' is not the name of a task"),
        ('{"configs": {"\\u001b[2J": {}}}', r"'\\x1b\[2J' is not the name of a task"),
        ('{"configs": {"quiz_poems": {}}, "group_subtasks": {"quiz": [[]]}}', r"an item is \[\]"),
        ('{"configs": {"quiz_poems": []}}', r"configs: quiz_poems is \[\]"),
        ('{"max_length": "4096"}', "max_length is '4096'"),
        ('{"results": {"quiz": {"acc,none": 1%s}}}' % ("0" * 400), "not a whole results file"),
        ('{"config": 5}', "config is 5"),
        ("{}", "lacks samples files"),
    ],
)
def test_a_damaged_results_file_is_named(copy, text, words):
    path = the_only(copy, "two/**/results_*.json")
    path.write_text(text)
    with pytest.raises(SurgeryError, match=words) as caught:
        compare(copy)
    assert str(path) in str(caught.value)


def test_nothing_in_common_is_refused(copy):
    with pytest.raises(SurgeryError, match="no task in common: nature has quiz_animals, quiz_plants; letters has"):
        compare(copy, "nature", "letters")
    for field in ("doc_hash", "prompt_hash"):
        change_samples(copy / "two", lambda sample, field=field: sample.update({field: "x" + sample[field]}))
    with pytest.raises(SurgeryError, match="have no question in common"):
        compare(copy)
    with pytest.raises(SurgeryError, match="one has no exact_match for any question: quiz_animals has acc"):
        compare(copy, metric="exact_match")


def test_what_cannot_be_compared_is_refused(stock, tmp_path):
    with pytest.raises(SurgeryError, match="given twice"):
        compare(stock, "one", "one")
    with pytest.raises(SurgeryError, match="nowhere is not there"):
        compare(stock, "one", "nowhere")
    (tmp_path / "notes.json").write_text("{}")
    with pytest.raises(SurgeryError, match="is not a results file"):
        compare_evaluations([stock / "one", tmp_path / "notes.json"])
    assert_refused(run_command("compare_checkpoints", stock / "one"), "at least two folders", code=2)
    assert_refused(run_command("compare_checkpoints", "a", "b", "--bootstrap", "5"), "at least 100", code=2)


def test_a_report_that_is_there_is_kept_unless_told_otherwise(stock, tmp_path):
    folders = (stock / "one", stock / "two", "--output_dir", tmp_path / "report")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "comparison.html").write_text("older")
    assert_refused(run_command("compare_checkpoints", *folders), "exists already", "--overwrite")
    assert (tmp_path / "report" / "comparison.html").read_text() == "older"
    (tmp_path / "report" / "thesis.tex").write_text("years of work")
    assert_refused(run_command("compare_checkpoints", *folders, "--overwrite"), "thesis.tex")
    (tmp_path / "report" / "thesis.tex").unlink()
    assert run_command("compare_checkpoints", *folders, "--overwrite").returncode == 0
    assert "<svg" in (tmp_path / "report" / "comparison.html").read_text()
