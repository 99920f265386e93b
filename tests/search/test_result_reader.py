"""Results of searches, ours and older programs', and the checkpoints that are built of them."""

import json
import shutil

import pytest

from model_preparation.errors import SurgeryError
from model_preparation.jobs.combinations import best_of
from model_preparation.search.result_reader import read_result, read_single_layers
from tests.conftest import assert_refused, run_command

WANTED = [((11, 13, 17, 21), 0.57), ((13, 17), 0.5544), ((17,), 0.5144)]
ROWS = [
    {"layers": [13, 17], "fitness": 0.5544, "num_layers": 2},
    {"layers": [21, 11, 13, 17], "fitness": 0.57, "num_layers": 4},
    {"layers": [17], "fitness": 0.5144, "num_layers": 1},
    {"layers": [2, 3], "fitness": 0.0, "num_layers": 2},
]
SHAPES = {
    "final_results": {"final_results": ROWS, "total_time_hours": 120},
    "a list": ROWS,
    "other names": {
        "results": [{"combination": row["layers"], "accuracy": row["fitness"]} for row in ROWS],
    },
    "an object by combination": {
        "final_results": {"_".join(map(str, row["layers"])): {"mmlu_score": row["fitness"]} for row in ROWS}
    },
    "scores by combination": {"top_combinations": {str(row["layers"]): row["fitness"] for row in ROWS}},
    "fitness values in a list": {"final_results": [{**row, "fitness": [row["fitness"]]} for row in ROWS]},
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_older_results_are_read(shape, tmp_path, capsys):
    path = write(tmp_path / "results.json", SHAPES[shape])
    found = read_result(path)
    assert [(each.layers, each.score) for each in found.entries] == WANTED
    assert found.failures == 1  # in older programs, a score of 0 was a failure
    combinations, flags = best_of(path, 2)
    assert [(each.name, each.layers, each.score) for each in combinations] == [
        ("llamba_replaced_11_13_17_21", (11, 13, 17, 21), "0.57"),
        ("llamba_replaced_13_17", (13, 17), "0.5544"),
    ]
    assert flags == {}
    assert "1 entries" in capsys.readouterr().out


def test_a_single_best_is_read(tmp_path):
    path = write(tmp_path / "best.json", {"best_individual": [11, 13], "best_fitness": 0.5})
    assert [(each.layers, each.score) for each in read_result(path).entries] == [((11, 13), 0.5)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ({"layers_found": []}, "has layers_found"),
        ([], "its final_results is empty"),
        ({"final_results": []}, "its final_results is empty"),
        ({"final_results": [{"fitness": 0.5}]}, "entry 1: it has no layers"),
        ({"final_results": [{"layers": [1, "x"], "fitness": 0.5}]}, "entry 1: 'x' is no layer's index"),
        ({"final_results": [{"layers": [1, 1], "fitness": 0.5}]}, "more than once"),
        ({"final_results": [{"layers": [1], "fitness": "good"}]}, "'good' is no number"),
        ({"final_results": [{"layers": [1], "fitness": 0}]}, "no combination with a score above 0"),
    ],
)
def test_what_cannot_be_read_is_named(content, words, tmp_path):
    path = write(tmp_path / "results.json", content)
    with pytest.raises(SurgeryError, match=words) as refused:
        read_result(path)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize(
    "singles",
    [
        {"11": 0.51, "3": 0.49},
        {"layer_11": {"score": 0.51}, "layer_3": {"accuracy": 0.49}},
        [{"layer": 11, "score": 0.51}, {"layer_idx": 3, "fitness": 0.49}],
        [{"layers": [11], "score": 0.51}, {"layers": [3], "score": 0.49}],
    ],
)
def test_single_layers_are_read_as_prior_knowledge(singles, tmp_path):
    path = write(tmp_path / "results.json", {"single_layer_results": singles})
    assert read_single_layers(path) == ({11: 0.51, 3: 0.49}, 0)


@pytest.mark.parametrize(("ours", "left_out"), [({}, 1), ({"settings": {}, "statistics": {}}, 0)])
def test_a_single_layer_that_failed_in_an_older_program_is_not_known(ours, left_out, tmp_path):
    path = write(tmp_path / "results.json", {"single_layer_results": {"11": 0.51, "3": 0.0}, **ours})
    known = {11: 0.51} if left_out else {11: 0.51, 3: 0.0}
    assert read_single_layers(path) == (known, left_out)
    path = write(tmp_path / "results.json", {"single_layer_results": {"11": 0.0}})
    with pytest.raises(SurgeryError, match="no single layer with a score above 0"):
        read_single_layers(path)


def test_a_file_without_single_layers_is_refused(tmp_path):
    with pytest.raises(SurgeryError, match="has no single_layer_results"):
        read_single_layers(write(tmp_path / "results.json", {"final_results": ROWS}))


def test_where_a_file_does_not_say_what_was_searched_the_error_says_what_to_give(checkpoint_dir, tmp_path):
    path = write(tmp_path / "results.json", {"final_results": [{"layers": [1, 3], "fitness": 0.5}]})
    shutil.copytree(checkpoint_dir, tmp_path / "out" / "llamba_replaced_1_3")  # of another base
    result = run_command("create_best_checkpoints", "--from", path, "--output_root", tmp_path / "out")
    assert_refused(result, "1 of 1 checkpoints failed", f"{path} does not name its base and layers")
    assert_refused(result, "The base unaligned_llamba", "give --base NAME|PATH and --llama_layers_dir DIR")


def test_a_folder_is_told_from_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SurgeryError, match=f"is a folder.*{tmp_path / 'search_result.json'}"):
        read_result(tmp_path)


def test_where_the_layers_were_removed_the_error_names_the_donor_of_the_file(tmp_path):
    gone = tmp_path / "donor_layers"
    settings = {"tasks": ["mmlu"], "limit": None}
    found = {"final_results": ROWS, "settings": settings, "statistics": {}, "objective": "accuracy", "tokenizer": None}
    origin = {"base": "tiny_llamba", "donor": "tiny_llama", "llama_layers_dir": str(gone)}
    path = write(tmp_path / "search_result.json", {**found, **origin})
    result = run_command("create_best_checkpoints", "--from", path, "--output_root", tmp_path / "out")
    assert_refused(result, f"extract_layers.py --model_name tiny_llama --output_dir {gone}", "--llama_layers_dir")
    assert not (tmp_path / "out").exists()
