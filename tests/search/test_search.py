"""The search as a whole. A killed search continues to the same result. One command builds the best.

What it builds has the score that the search gave.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model_preparation import build_checkpoint, evaluate_checkpoint, load_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.compare.paired import holm, mcnemar_p
from model_preparation.io.self_checksum import checksum_fault
from model_preparation.search import report
from model_preparation.search import search as search_module
from model_preparation.search.journal import Journal
from model_preparation.search.search import search_layers
from model_preparation.search.settings import SearchSettings
from model_preparation.search.shared_scoring import SharedScorer
from model_preparation.search_layers import _parser
from tests.browser import WIDTHS, look_at, needs_chromium
from tests.conftest import PACKAGE, assert_refused, run_command
from tests.search.conftest import make_questions, write_task

COMPARED = ("final_results", "base_score", "base_stderr", "pareto", "single_layer_results", "dropped", "failed")
SMALL = {"population": 6, "generations": 2, "patience": 2, "beam_width": 2, "top": 3, "limit": 6}
FEW = {"method": "singles", "max_layers": 1, "budget_evaluations": 1}
pytestmark = pytest.mark.usefixtures("datasets_cache", "quick_children")


def test_results_go_beside_the_package_by_default_wherever_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _parser().get_default("output_dir") == PACKAGE.parent / "searches" / "search"


def killed_after(lines: int, settings: SearchSettings) -> None:
    """Search in a process that is killed when the journal has `lines` lines, in the middle of the next one."""
    child = os.fork()
    if child == 0:
        append = Journal.append

        def append_or_die(journal, entry):
            if len(journal.entries) == lines:
                with journal.path.open("ab") as file:
                    file.write(b'{"settings": "half a li')
                os.kill(os.getpid(), signal.SIGKILL)
            append(journal, entry)

        Journal.append = append_or_die
        search_layers(settings)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("method", "objective", "sizes"),
    [
        ("ga", "accuracy", {"max_layers": 3}),
        ("beam", "kl", {"unit": "heads", "max_heads": 2}),
        ("removal", "nll", {"max_layers": 3}),
    ],
)
def test_killed_again_and_again_it_ends_like_an_uninterrupted_search(make_settings, tmp_path, method, objective, sizes):
    changes = {"method": method, "objective": objective, **sizes, **SMALL}
    whole = search_layers(make_settings(tmp_path / "whole", **changes))
    lines = len((tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines())
    settings = make_settings(tmp_path / "cut", **changes)
    for killed_at in (3, lines - 2):
        killed_after(killed_at, settings)
        assert not (tmp_path / "cut" / "search_result.json").exists()
    found = search_layers(settings)
    compared = {name.replace("layer", "head") if "unit" in sizes else name for name in COMPARED}
    assert {name: found[name] for name in compared} == {name: whole[name] for name in compared}
    assert found["statistics"]["evaluations"] == whole["statistics"]["evaluations"]
    assert found["statistics"]["layer_passes"] > whole["statistics"]["layer_passes"]  # the base ran again
    asked = [json.loads(line) for line in (tmp_path / "cut" / "journal.jsonl").read_bytes().splitlines()]
    sets = [(each.get("layers") or each.get("heads"), each.get("parts")) for each in asked]
    made = [(tuple(each), tuple(parts)) for each, parts in sets if each]
    assert len(made) == len(set(made))  # nothing was evaluated twice


@pytest.fixture(scope="module")
def exhaustive(make_settings, tmp_path_factory):
    """(folder, result) of all combinations of up to 3 layers."""
    folder = tmp_path_factory.mktemp("searches") / "all"
    return folder, search_layers(make_settings(folder, method="exhaustive", max_layers=3))


def test_the_result_says_what_was_found(exhaustive):
    folder, found = exhaustive
    assert checksum_fault((folder / "search_result.json").read_bytes()) is None
    written = json.loads((folder / "search_result.json").read_text())
    assert {name: written[name] for name in found} == found
    rows = found["final_results"]
    assert len(rows) == 14
    assert [row["fitness"] for row in rows] == sorted((row["fitness"] for row in rows), reverse=True)
    assert rows[0]["verdict"] == "the best"
    assert {row["kv_bytes_per_token"] / row["num_layers"] for row in rows} == {2 * 1 * 16 * 4}
    front = found["pareto"]
    assert [row["kv_bytes_per_token"] for row in front] == sorted({row["kv_bytes_per_token"] for row in front})
    for row in [*rows, {"kv_bytes_per_token": 0, "fitness": found["base_score"]}]:
        assert any(
            other["fitness"] >= row["fitness"] and other["kv_bytes_per_token"] <= row["kv_bytes_per_token"]
            for other in front
        )
    statistics = found["statistics"]
    assert statistics["evaluations"] == 14
    assert statistics["layer_passes"] == pytest.approx(29, abs=0.01)
    assert statistics["layer_passes_alone"] == 56
    assert 0 < found["donor_score"] < 1


def test_the_p_values_are_those_of_the_answers(exhaustive):
    folder, found = exhaustive
    right = {}
    for line in (folder / "journal.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "right" in entry:
            right[tuple(entry["layers"])] = [int(digit) for digit in entry["right"]]
    rows = found["final_results"]
    best = right[tuple(rows[0]["layers"])]
    p_values = []
    for row in rows[1:]:
        other = right[tuple(row["layers"])]
        gained = sum(one > two for one, two in zip(best, other, strict=True))
        lost = sum(one < two for one, two in zip(best, other, strict=True))
        p_values.append(mcnemar_p(gained, lost))
        assert row["fitness"] == pytest.approx(sum(other) / 20)
    assert [row["p_against_best"] for row in rows[1:]] == pytest.approx(holm(p_values))


def test_the_report_needs_nothing_else(exhaustive):
    folder, found = exhaustive
    page = (folder / "report.html").read_text()
    assert " ".join(map(str, found["final_results"][0]["layers"])) in page
    assert page.count("<svg") == 4
    assert "http://" not in page.replace("http://www.w3.org", "")
    for name in ("single_layers", "pairs", "history", "pareto"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@needs_chromium
def test_nothing_in_the_report_is_wider_than_the_window(exhaustive, tmp_path):
    seen = look_at(
        exhaustive[0] / "report.html", tmp_path, "window.seen = {drawn: document.querySelectorAll('svg').length};"
    )
    assert seen == {"widths": list(WIDTHS), "drawn": 4}


def test_a_budget_of_bytes_leaves_out_larger_combinations(exhaustive, make_settings, tmp_path):
    # A grafted layer takes 128 bytes per token. A Mamba layer takes 2048 bytes at any length.
    lines = []
    few = {"method": "exhaustive", "max_layers": 3, "max_cache_bytes": 2 * 128 * 32 + 2 * 2048, "at_tokens": 32}
    found = search_layers(make_settings(tmp_path / "few", **few), say=lines.append)
    assert found["final_results"] != []
    assert [row["layers"] for row in found["final_results"]] == [
        row["layers"] for row in exhaustive[1]["final_results"] if row["num_layers"] <= 2
    ]
    (line,) = (line for line in lines if line.startswith("Cache "))
    assert line.split(maxsplit=1)[1] == (
        "at most 12,288 bytes after 32 tokens; the largest candidate needs 12,288; left out: 3 layers"
    )
    # After one token a grafted layer is the smaller one.
    lines.clear()
    search_layers(
        make_settings(tmp_path / "x", **few | {"at_tokens": 1, "max_cache_bytes": 3000}), say=lines.append, dry_run=True
    )
    assert any("left out: 1, 2 layers" in line for line in lines)
    with pytest.raises(SurgeryError, match=r"1 to 3 layers has a cache of at least 10,240 bytes .* is 5\. Give a"):
        search_layers(make_settings(tmp_path / "x", **few | {"max_cache_bytes": 5}), dry_run=True)
    with pytest.raises(SurgeryError, match="Give both --max_cache_bytes and --at_tokens"):
        search_layers(make_settings(tmp_path / "x", **few | {"max_cache_bytes": None}), dry_run=True)


@pytest.mark.parametrize(("p_value", "words"), [(0.0004, "(p &lt; 0.001)"), (0.032, "(p = 0.032)")])
def test_the_report_says_how_small_a_p_value_is(exhaustive, tmp_path, monkeypatch, p_value, words):
    found = {**exhaustive[1], "final_results": [{**exhaustive[1]["final_results"][0], "p_against_base": p_value}]}
    monkeypatch.setattr(report, "PLOTS", {})
    report.write_report(found, SimpleNamespace(order=[]), tmp_path)
    assert words in (tmp_path / "report.html").read_text()


def test_a_finished_search_is_given_again_without_running_a_layer(exhaustive, make_settings, monkeypatch):
    folder, found = exhaustive
    monkeypatch.setattr(SharedScorer, "_step", None)
    again = search_layers(**vars(make_settings(folder, method="exhaustive", max_layers=3)))
    assert {name: again[name] for name in COMPARED} == {name: found[name] for name in COMPARED}


def test_a_setting_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(TypeError, match="beam_widht"):
        search_layers(output_dir=tmp_path, donor="tiny_llama", beam_widht=3)


def test_another_search_replaces_no_result_unless_it_is_told_to(exhaustive, make_settings, tmp_path, monkeypatch):
    folder = shutil.copytree(exhaustive[0], tmp_path / "search")
    files = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    monkeypatch.setattr(SharedScorer, "_step", None)
    same = make_settings(folder, method="exhaustive", max_layers=3)
    for change, words in (
        ({"max_layers": 2}, "max_layers: was 3, is now 2"),
        ({"budget_evaluations": 9}, "budget_evaluations: was not given, is now 9"),
        ({"limit": 3}, "limit: was not given, is now 3"),
        ({"batch_size": 2}, "batch_size: was 3, is now 2"),
        ({"donor": None}, "donor: was given, is now not given"),
    ):
        with pytest.raises(SurgeryError, match=words):
            search_layers(same, dry_run="limit" in change, **change)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == files
    search_layers(same, seed=5)  # which has no part in this method
    found = search_layers(same, max_layers=2, overwrite=True)  # runs nothing
    assert len(found["final_results"]) == 10
    assert json.loads((folder / "search_result.json").read_text())["final_results"] == found["final_results"]
    assert (folder / "journal.jsonl").read_bytes() == files[folder / "journal.jsonl"]
    (folder / "search_result.json").write_text("[")
    with pytest.raises(SurgeryError, match="cannot be read as a search's result"):
        search_layers(same)


def another(folder: Path, target: Path) -> Path:
    """A copy of a model in which every weight has the other sign."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    save_file({name: -tensor for name, tensor in weights.items()}, target / "model.safetensors", {"format": "pt"})
    return target


def test_another_model_under_the_same_name_is_found_out(make_settings, base_dir, donor_dir, tmp_path):
    """Layers and scores belong to the models that the names stand for now."""
    other = another(donor_dir, tmp_path / "other")

    def settings(donor: Path, folder: str = "search") -> SearchSettings:
        given = {"donor": "llama", "sources": {"llama": str(donor)}, "llama_layers_dir": None}
        return make_settings(tmp_path / folder, **given, **FEW)

    first = search_layers(settings(donor_dir))
    for remove_result in (False, True):
        if remove_result:
            (tmp_path / "search" / "search_result.json").unlink()
        with pytest.raises(
            SurgeryError, match=r"The layers in .* are not those that llama has now: layer 0: the content"
        ):
            search_layers(settings(other))
    found = search_layers(settings(other), overwrite=True)
    alone = search_layers(settings(other, "alone"))
    assert {name: found[name] for name in COMPARED} == {name: alone[name] for name in COMPARED}
    assert found["donor_score"] == alone["donor_score"]
    assert found["inputs"] == alone["inputs"]
    assert found["inputs"]["base"] == first["inputs"]["base"]
    again = search_layers(settings(shutil.copytree(other, tmp_path / "moved"), folder="alone"))
    assert again["inputs"] == alone["inputs"]


@pytest.mark.parametrize("what", ["base", "donor", "tokenizer"])
def test_what_was_replaced_after_a_search_is_named(make_settings, base_dir, donor_dir, tmp_path, what):
    tokenizer = shutil.copytree(donor_dir, tmp_path / "tokenizer")
    donor = shutil.copytree(donor_dir, tmp_path / "donor")
    base = shutil.copytree(base_dir, tmp_path / "base")
    names = {"base": str(base), "donor": str(donor), "tokenizer": str(tokenizer)}
    settings = make_settings(tmp_path / "search", **names, **FEW)
    first = search_layers(settings)
    if what == "base":
        weights = torch.load(base / "pytorch_model.bin")
        torch.save({name: tensor.neg() for name, tensor in weights.items()}, base / "pytorch_model.bin")
    else:
        path = tokenizer / "tokenizer_config.json" if what == "tokenizer" else donor / "config.json"
        changed = {"padding_side": "left"} if what == "tokenizer" else {"rms_norm_eps": 0.1}
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(SurgeryError, match=rf"has the result of another search.*: {what}: the content has changed\."):
        search_layers(settings)
    found = search_layers(settings, overwrite=True)
    assert (found["donor_score"] == first["donor_score"]) is (what != "donor")
    assert (found["base_score"] == first["base_score"]) is (what != "base")


def test_the_best_are_built_by_one_command_and_score_what_was_said(exhaustive, task_dir, tmp_path):
    folder, found = exhaustive
    result = run_command(
        "create_best_checkpoints", "--from", folder / "search_result.json", "--top", 2, "--output_root", tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "does not name its base and layers" not in result.stdout
    for row in found["final_results"][:2]:
        checkpoint = tmp_path / ("llamba_replaced_" + "_".join(map(str, row["layers"])))
        info = json.loads((checkpoint / "checkpoint_info.json").read_text())
        assert info["replaced_layers"] == row["layers"]
        assert info["mmlu_score"] is None  # the search's score is for another task
        evaluated = evaluate_checkpoint(checkpoint, tasks=[str(task_dir)], batch_size=3)
        right = sum(task["score"] * task["questions"] for task in evaluated["tasks"].values())
        assert row["accuracy"] == pytest.approx(right / evaluated["questions"])


def test_a_search_from_a_checkpoint_adds_to_its_grafts(checkpoint_dir, layers_dir, base_dir, task_dir, tmp_path):
    """Layers 1 and 3 of four are grafted: 0, 2 and both together are left."""
    out = tmp_path / "search"
    asked = ("--llama_layers_dir", layers_dir, "--task", task_dir, "--batch_size", 3, "--output_dir", out)
    result = run_command(
        *("search_layers", "--start", checkpoint_dir, *asked, "--method", "exhaustive", "--max_layers", 2)
    )
    assert result.returncode == 0, result.stderr
    assert "with layers 1 3 grafted" in result.stdout
    assert "Candidates   3, of which 3 are evaluated" in result.stdout
    found = json.loads((out / "search_result.json").read_text())
    rows = {tuple(row["layers"]): row for row in found["final_results"]}
    assert rows.keys() == {(0,), (2,), (0, 2)}
    assert (found["base"], found["start_layers"]) == (str(checkpoint_dir), [1, 3])
    assert rows[0, 2]["kv_bytes_per_token"] == 4 * 2 * 16 * 4  # four layers of keys and values, one head of 16 each
    built = ("create_best_checkpoints", "--from", out / "search_result.json", "--top", 3, "--output_root", tmp_path)
    result = run_command(*built)
    assert result.returncode == 0, result.stderr
    for layers, row in rows.items():
        checkpoint = tmp_path / ("llamba_replaced_" + "_".join(map(str, layers)))
        info = json.loads((checkpoint / "checkpoint_info.json").read_text())
        assert info["replaced_layers"] == sorted([1, 3, *layers])
        scored = evaluate_checkpoint(checkpoint, tasks=[str(task_dir)], batch_size=3)
        right = sum(task["score"] * task["questions"] for task in scored["tasks"].values())
        assert row["accuracy"] == pytest.approx(right / scored["questions"])
    again = run_command(*built)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("is complete already") == 3
    start = ("search_layers", "--start", checkpoint_dir, *asked[:-1], tmp_path / "out")
    assert_refused(run_command(*start, "--base", base_dir), "takes the place of --base")
    assert_refused(run_command(*start, "--max_layers", 3), "has 2 layers that are not grafted. Give --max_layers 2")
    assert not (tmp_path / "out").exists()


def test_what_is_not_finite_is_a_failure_with_its_reason(make_settings, tmp_path, monkeypatch):
    class Broken(search_module.ScoringSetup):
        def __init__(self, *given):
            super().__init__(*given)
            self.pair.model.backbone.layers[2].mlp.down_proj.weight.data.fill_(float("nan"))

    monkeypatch.setattr(search_module, "ScoringSetup", Broken)
    found = search_layers(make_settings(tmp_path, method="singles"))
    assert [row["layers"] for row in found["final_results"] if row["layers"] == [2]] == []
    assert len(found["final_results"]) == 3
    assert [each["layers"] for each in found["failed"]] == [[2]]
    assert "are not finite" in found["failed"][0]["reason"]


GENERATING = {"output_type": "generate_until", "generation_kwargs": {"until": ["."]}}
ROLLING = {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]}
FILTERED = {"filter_list": [{"name": "first", "filter": [{"function": "take_first"}]}]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [(ROLLING, "of whole texts"), (FILTERED, "has filters"), ({}, "no metric acc")],
)
def test_tasks_that_cannot_be_taken_are_refused(make_settings, tmp_path, monkeypatch, changes, words):
    """If the definition shows the reason, no data is loaded. One bad task in a group is enough."""
    if not changes:
        folder = write_task(tmp_path / "task", "odd", make_questions(3), metric_list=[{"metric": "acc_norm"}])
    else:
        monkeypatch.setattr("datasets.load_dataset", lambda *given, **named: pytest.fail("it looked for data"))
        changes = {"doc_to_choice": None, "doc_to_target": "{{choices[0]}}", **changes}
        folder = write_task(tmp_path / "task", "odd", make_questions(3), **changes)
        write_task(folder, "good", make_questions(3))
        (folder / "both.yaml").write_text(json.dumps({"group": "both", "task": ["good", "odd"]}))
    with pytest.raises(SurgeryError, match=words) as refused:
        search_layers(make_settings(tmp_path / "out", tasks=(str(folder),)))
    assert "multiple_choice" in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changes", [{"doc_to_target": -1}, {"doc_to_target": "None of them"}, GENERATING])
def test_nll_needs_the_right_answer(make_settings, tmp_path, changes):
    unanswered = (
        {"doc_to_choice": None, "doc_to_target": "", "metric_list": [{"metric": "bypass"}], **changes}
        if changes is GENERATING
        else changes
    )
    folder = write_task(tmp_path / "task", "unanswered", make_questions(3), **unanswered)
    with pytest.raises(SurgeryError, match=r"the task unanswered has none for .*'context'.* Choose another"):
        search_layers(make_settings(tmp_path / "out", tasks=(str(folder),), objective="nll"))


def journaled(folder: Path, name: str) -> dict[tuple[int, ...], list]:
    """The journal's field `name` by set. Only for searches without a race, which write one entry for a set."""
    entries = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    questions = {}
    for entry in entries:
        if name in entry:
            questions[tuple(entry["layers"])] = entry[name]
    return questions


def test_nll_is_the_loss_of_the_right_answer_in_the_built_checkpoint(make_settings, layers_dir, base_dir, tmp_path):
    """The value equals the log-likelihood of the right answer, divided by its tokens, to the bit."""
    folder = write_task(tmp_path / "task", "words", make_questions(6))
    changes = {"tasks": (str(folder),), "method": "singles", "objective": "nll"}
    found = search_layers(make_settings(tmp_path / "out", **changes))
    best = found["final_results"][0]
    build_checkpoint(str(base_dir), best["layers"], layers_dir, tmp_path / "graft")
    evaluated = evaluate_checkpoint(tmp_path / "graft", tasks=[str(folder)], batch_size=3)
    (path,) = (tmp_path / "graft" / "evaluations").glob("*/answers/*.json")
    answers = iter(json.loads(path.read_text())["answers"])
    _, tokenizer = load_checkpoint(tmp_path / "graft")
    losses = []
    for row in make_questions(6):
        likelihoods = [next(answers)[0] for _ in row["choices"]]
        option = " " + row["choices"][row["answer"]]  # lm-eval puts a space before it
        losses.append(likelihoods[row["answer"]] / len(tokenizer(option, add_special_tokens=False)["input_ids"]))
    assert sorted(journaled(tmp_path / "out", "values")[tuple(best["layers"])]) == sorted(losses)
    assert best["fitness"] == pytest.approx(sum(losses) / 6)
    assert best["accuracy"] == pytest.approx(evaluated["score"])
    assert found["donor_score"] < 0
    assert "loss of the right answer" in (tmp_path / "out" / "report.html").read_text()


def test_a_task_that_generates_is_searched_by_its_right_answers(tmp_path):
    """The right answers of embedded_recall's two forms are the same, and so are their losses, to the bit."""
    found, right = {}, {}
    for task in ("embedded_recall", "embedded_recall_generated"):
        common = {"base": "tiny_llamba", "donor": "tiny_llama", "lengths": (32, 64), "limit": 2, "objective": "nll"}
        result = search_layers(output_dir=tmp_path / task, tasks=(task,), method="singles", **common)
        rows = {tuple(row["layers"]): row for row in result["final_results"]}
        found[task] = [result["base_score"], result["donor_score"], *(rows[layer,]["fitness"] for layer in range(12))]
        right[task] = {layers: row["accuracy"] for layers, row in rows.items()}
        assert result["settings"]["recall"] == {"lengths": [32, 64], "language": "en"}
    assert found["embedded_recall"] == found["embedded_recall_generated"]
    result = search_layers(
        output_dir=tmp_path / "right", **{**common, "objective": "accuracy"}, tasks=(task,), method="singles"
    )
    assert {tuple(row["layers"]): row["fitness"] for row in result["final_results"]} == right[task]
    result = search_layers(output_dir=tmp_path / "kl", **{**common, "objective": "kl"}, tasks=(task,), method="singles")
    assert result["donor_score"] == 0 > result["final_results"][0]["fitness"] > result["base_score"]
    ratio = {**common, "tasks": ("embedded_recall_generated",), "lengths": (32,), "method": "ratio"}
    with pytest.raises(SurgeryError, match="The method is ratio, and second_task is None"):
        search_layers(output_dir=tmp_path / "ratio", **ratio)
    both = search_layers(output_dir=tmp_path / "ratio", **ratio, second_task="embedded_recall", max_layers=2)
    assert both["questions"] == 4
    assert sorted(row["num_layers"] for row in both["final_results"]) == [1, 2]
    build_checkpoint("tiny_llamba", [10], tmp_path / "embedded_recall" / "donor_layers", tmp_path / "graft")
    written = evaluate_checkpoint(tmp_path / "graft", tasks=["embedded_recall_generated"], lengths=(32, 64), limit=2)
    scores = [row["score"] for row in written["tasks"].values()]
    assert right["embedded_recall_generated"][10,] == pytest.approx(sum(scores) / 2)  # by greedy decoding


def test_the_command(base_dir, donor_dir, task_dir, tmp_path):
    flags = ["--base", base_dir, "--donor", donor_dir, "--task", task_dir, "--output_dir", tmp_path / "out"]
    prior = tmp_path / "prior.json"
    prior.write_text('{"single_layer_results": {"0": 0.4, "1": 0.0, "2": 0.5, "3": 0.6}}')
    exhaustive = ("--method", "exhaustive", "--max_layers", 2)
    plan = run_command("search_layers", *flags, *exhaustive, "--prior", prior, "--dry_run")
    assert plan.returncode == 0, plan.stderr
    assert not (tmp_path / "out").exists()  # not even the donor's layers
    assert f"1 of 4 single layers in {prior} are left out" in plan.stdout
    assert "20 of" in plan.stdout
    assert "Candidates   10" in plan.stdout
    assert "% saved" in plan.stdout
    result = run_command("search_layers", *flags, "--method", "greedy", "--max-layers", 2, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"Result is in {tmp_path / 'out' / 'search_result.json'}")
    assert (tmp_path / "out" / "donor_layers" / "metadata.json").exists()
    found = json.loads((tmp_path / "out" / "search_result.json").read_text())
    table = result.stdout.splitlines()[-1 - 3 - len(found["final_results"]) : -1]
    assert table[2].split() == ["donor", f"{found['donor_score']:.4f}"]
    column = table[0].index("accuracy")
    for row, line in zip(found["final_results"], table[3:], strict=True):
        assert line[:column].split() == [str(layer) for layer in row["layers"]]
        assert line[column:].startswith(f"{row['fitness']:.4f} ± ")
    others = run_command("search_layers", *flags, "--method", "beam", "--max_layers", 2)
    assert_refused(others, f"{tmp_path / 'out'} has the result of another search", "method: was greedy, is now beam")
    assert_refused(others, "another --output_dir, or add --overwrite")
    assert_refused(run_command("search_layers", "--base", base_dir), "--donor", code=2)
    for given, words in (
        (("--method", "ga", "--beam_width", 4), "--beam_width belongs to --method beam, but the method is ga"),
        (("--method", "beam", "--patience", 4), "--patience belongs to --method ga, but the method is beam"),
        (("--second_task", "mmlu"), "--second_task belongs to --method ratio"),
        (("--mmlu-data", tmp_path), "--mmlu_data belongs to --task mmlu"),
    ):
        assert_refused(run_command("search_layers", *flags, *given), words, code=2)
    no_donor = ["--base", base_dir, "--llama_layers_dir", tmp_path / "out" / "donor_layers", "--task", task_dir]
    refused = run_command("search_layers", *no_donor, "--objective", "kl", "--output_dir", tmp_path / "kl")
    assert_refused(refused, "Name the donor by --donor")
    with contextlib.suppress(FileNotFoundError):
        assert list((tmp_path / "kl").iterdir()) == []


def test_what_cannot_be_is_said_before_the_donor_is_extracted(base_dir, donor_dir, task_dir, tmp_path):
    def search(*flags: object, base: object = base_dir) -> subprocess.CompletedProcess:
        return run_command("search_layers", "--base", base, "--donor", donor_dir, "--task", task_dir, *flags)

    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("not a search")
    out = ("--output_dir", tmp_path / "out")
    assert_refused(search("--output_dir", other), "holds other files (mine.txt)", "Choose another --output_dir")
    assert_refused(search("--output_dir", other / "mine.txt"), "mine.txt is a file")
    assert_refused(search(*out, base=tmp_path / "none"), "none is not there")
    assert_refused(search(*out, "--task", "no_such_task"), "no task 'no_such_task'")
    two_at_least = ("--llama_layers_dir", tmp_path, "--method", "singles", "--min_layers", 2)
    assert_refused(search(*out, *two_at_least), "one layer at a time")
    assert_refused(search(*out, "--max_layers", 9), "the base has 4 layers")
    assert_refused(search(*out, "--method", "singles", "--max_layers", 3), "leave out --max_layers 3", code=2)
    few = ("--method", "greedy", "--min_layers", 3, "--max_layers", 3, "--budget_evaluations", 5)
    assert_refused(search(*out, *few), "5 smaller sets before the first set of 3 layers", "--budget_evaluations 6")
    assert_refused(search(*out, "--prior", tmp_path / "none.json"), "none.json is not there")
    prior = other / "mine.txt"
    prior.write_text('{"single_layer_results": {"3": 0.5, "11": 0.51}}')
    refused = search(*out, "--prior", prior)
    assert_refused(refused, f"{prior} has a score for layer 11, but the base has 4 layers")
    assert "Candidates" not in refused.stdout
    assert_refused(search(*out, base=donor_dir), "is a llama model. The base must be a Llamba")
    assert_refused(search(*out, "--donor", base_dir), "a donor must be llama")
    assert_refused(search(*out, "--tokenizer", "nope"), "'nope' is neither")
    broken = write_task(tmp_path / "broken", "broken", make_questions(2))
    (broken / "broken.jsonl").unlink()
    no_data = run_command("search_layers", "--base", base_dir, "--donor", donor_dir, "--task", broken, *out)
    assert no_data.returncode != 0
    shutil.rmtree(broken)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


def test_single_layers_in_a_race_take_less_than_half_of_each_alone(tmp_path):
    """With the embedded pair, of n = 12 layers. Each single layer alone would take n layer passes.

    Without a race, sharing alone takes (n + n (n + 1) / 2) / n^2 of these passes, which is more than half.
    """
    flags = ["--base", "tiny_llamba", "--donor", "tiny_llama", "--task", "embedded_recall", "--limit", 60]
    race = ["--method", "singles", "--race", "on", "--top", 1, "--device", "cpu", "--output_dir", tmp_path / "out"]
    result = run_command("search_layers", *flags, *race)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "search_result.json").read_text())
    assert found["final_results"][0]["layers"] == [10]
    assert len(found["final_results"]) + len(found["dropped"]) == found["statistics"]["evaluations"] == 12
    assert found["statistics"]["layer_passes"] <= 0.5 * found["statistics"]["layer_passes_alone"]
