"""A search over heads: scores of the checkpoints that are built, what is shared, budgets, seeds, what is refused."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from model_preparation import build_checkpoint, evaluate_checkpoint, load_checkpoint, search_layers
from model_preparation.errors import SurgeryError
from model_preparation.llamba.cache_llamba import LlambaCache
from model_preparation.search.scoring_setup import ScoringSetup
from model_preparation.search.shared_scoring import SharedScorer
from tests.conftest import assert_refused, run_command
from tests.search.test_shared_scoring import assert_answers_are, assert_divergences_are, records_of

pytestmark = pytest.mark.usefixtures("datasets_cache", "quick_children")

# The tiny pair has four layers; its donor has two query heads in each, which share one key/value head.
NAMES = [f"{layer}:{head}" for layer in range(4) for head in range(2)]
PAIRS = [[name] for name in NAMES] + [list(pair) for pair in itertools.combinations(NAMES, 2)]

FEW = {"limit": 6}  # questions of each task, in all searches that are compared


def by_layer(names: list[str]) -> dict[int, list[int]]:
    pairs = [tuple(map(int, name.split(":"))) for name in names]
    return {layer: [head for each, head in pairs if each == layer] for layer, _ in pairs}


@pytest.fixture(scope="module")
def pairs(make_settings, tmp_path_factory):
    """(folder, result) of all single heads and pairs, by the loss of the right answer."""
    folder = tmp_path_factory.mktemp("heads") / "pairs"
    settings = make_settings(folder, unit="heads", method="exhaustive", max_heads=2, objective="nll", **FEW)
    return folder, search_layers(settings)


def test_all_pairs_have_the_scores_of_the_built_checkpoints(
    pairs, make_settings, task_dir, base_dir, layers_dir, tmp_path
):
    """Answers are equal to the bit, also for two heads of one layer and for questions that share a prefix."""
    folder, found = pairs
    rows = {tuple(row["heads"]): row for row in found["final_results"]}
    assert sorted(rows) == sorted(map(tuple, PAIRS))
    setup = ScoringSetup(make_settings(tmp_path, unit="heads", **FEW))
    sets = {names: setup.pair.units.read(names) for names in (("3:1",), ("0:0", "2:1"), ("1:0", "1:1"))}
    results = dict(SharedScorer(setup).score(sets.values()))
    assert any(setup.questions.prefixes)
    for names, numbers in sets.items():
        checkpoint = tmp_path / names[-1].replace(":", "-")
        build_checkpoint(str(base_dir), [], layers_dir, checkpoint, heads=by_layer(names))
        evaluated = evaluate_checkpoint(checkpoint, tasks=[str(task_dir)], batch_size=3, **FEW)
        assert_answers_are(records_of(checkpoint), setup.questions, results[numbers])
        right = sum(task["score"] * task["questions"] for task in evaluated["tasks"].values())
        row = rows[names]
        assert row["accuracy"] == pytest.approx(right / evaluated["questions"])
        model, _ = load_checkpoint(checkpoint)
        cache = LlambaCache(model.config)
        with torch.no_grad():
            model(torch.tensor([[5, 6, 7]]), past_key_values=cache, use_cache=True)
        kept = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
        assert row["kv_bytes_per_token"] == 2 * sum(keys.nbytes for keys in kept) // 3
    assert found["statistics"]["evaluations"] == len(PAIRS)
    beginnings = {  # what is before the first difference is run once
        (depth, tuple(name for name in names if int(name[0]) < depth))
        for names in PAIRS
        for depth in range(int(names[0][0]) + 1, 5)
    }
    assert found["statistics"]["layer_passes"] == pytest.approx(4 + len(beginnings), abs=0.05)
    assert found["single_head_results"].keys() == set(NAMES)
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "1:0,1</td>" in page
    assert (folder / "single_heads.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("keep", [False, True])
def test_the_divergence_is_that_of_whole_forward_passes(make_settings, base_dir, layers_dir, donor_dir, tmp_path, keep):
    heads = {"heads": {1: [0, 1], 3: [0]}, "keep_mixer_heads": keep}
    build_checkpoint(str(base_dir), [], layers_dir, tmp_path / "graft", **heads)
    setup = ScoringSetup(make_settings(tmp_path, unit="heads", objective="kl", keep_mixer_heads=keep))
    ((_, results),) = SharedScorer(setup).score([setup.pair.units.read(["1:0", "1:1", "3:0"])])
    assert_divergences_are(setup.questions, results, tmp_path / "graft", donor_dir)


def test_greedy_adds_what_an_independent_loop_adds(pairs, make_settings, tmp_path):
    fitness = {tuple(row["heads"]): row["fitness"] for row in pairs[1]["final_results"]}
    single = max((each for each in fitness if len(each) == 1), key=fitness.get)
    wanted = max((each for each in fitness if len(each) == 2 and set(single) < set(each)), key=fitness.get)
    changes = {"unit": "heads", "method": "greedy", "max_heads": 2, "objective": "nll", **FEW}
    whole = search_layers(make_settings(tmp_path / "whole", **changes, race=False))
    best = next(row for row in whole["final_results"] if row["num_heads"] == 2)
    assert (tuple(best["heads"]), best["fitness"]) == (wanted, fitness[wanted])
    # A race ends at the same set. What is known from another search's result is not evaluated again.
    known = make_settings(tmp_path / "known", **changes, prior=pairs[0] / "search_result.json")
    found = search_layers(known)
    assert found["final_results"][0]["heads"] == whole["final_results"][0]["heads"]
    assert {row["num_heads"] for row in [*found["final_results"], *found["dropped"]]} <= {2}, found["dropped"]


def test_the_mixers_may_stay_whole(pairs, make_settings, task_dir, tmp_path):
    """And the best are built as they were scored, by one command."""
    changes = {"unit": "heads", "method": "singles", "keep_mixer_heads": True, "tasks": (str(task_dir),), **FEW}
    found = search_layers(make_settings(tmp_path / "search", **changes, objective="nll"))
    other = {tuple(row["heads"]): row["fitness"] for row in pairs[1]["final_results"]}
    assert all(row["fitness"] != other[tuple(row["heads"])] for row in found["final_results"])
    result = tmp_path / "search" / "search_result.json"
    command = ("create_best_checkpoints", "--from", result, "--output_root", tmp_path)
    for word in ("built", "skipped"):
        built = run_command(*command)
        assert built.returncode == 0, built.stderr
        assert word in built.stdout.splitlines()[-1]
    best = found["final_results"][0]
    checkpoint = tmp_path / ("llamba_replaced_" + best["heads"][0].replace(":", "-"))
    info = json.loads((checkpoint / "checkpoint_info.json").read_text())
    assert info["grafted_heads"] == {str(key): heads for key, heads in by_layer(best["heads"]).items()}
    assert info["keep_mixer_heads"] is True
    evaluated = evaluate_checkpoint(checkpoint, tasks=[str(task_dir)], batch_size=3, **FEW)
    right = sum(task["score"] * task["questions"] for task in evaluated["tasks"].values())
    assert best["accuracy"] == pytest.approx(right / evaluated["questions"])


def test_a_budget_of_bytes_counts_the_key_value_heads_that_are_shared(pairs, make_settings, tmp_path):
    """A key/value head takes 128 bytes per token; the states of the four mixers 2048 each."""
    changes = {"unit": "heads", "method": "exhaustive", "max_heads": 4, "objective": "nll", "at_tokens": 32, **FEW}
    lines = []
    settings = make_settings(tmp_path / "one", **changes, max_cache_bytes=4 * 2048 + 128 * 32 + 100)
    found = search_layers(settings, say=lines.append)
    both = [[f"{layer}:0", f"{layer}:1"] for layer in range(4)]
    assert [row["heads"] for row in found["final_results"]] == [
        row["heads"] for row in pairs[1]["final_results"] if row["num_heads"] == 1 or row["heads"] in both
    ]
    assert {row["kv_bytes_per_token"] for row in found["final_results"]} == {128}
    assert any("Candidates   12, of which 12 are evaluated" in line for line in lines)
    assert any("may need at most 1 key/value heads; left out: 3, 4 heads" in line for line in lines)
    with pytest.raises(SurgeryError, match="of 1 to 4 heads has a cache of at least 12,288 bytes"):
        search_layers(settings, output_dir=tmp_path / "none", max_cache_bytes=8192, dry_run=True)
    for method in ("ga", "beam"):
        changes = {"output_dir": tmp_path / method, "method": method, "limit": 2, "batch_size": 16, "race": False}
        found = search_layers(settings, **changes, budget_evaluations=20, max_cache_bytes=4 * 2048 + 8192)
        assert {row["kv_bytes_per_token"] for row in found["final_results"]} <= {128, 256}
        assert max(row["num_heads"] for row in found["final_results"]) > 2


@pytest.mark.parametrize("text", ["3:1  # the best\n# published\n0:1,0\n", '["3:1", "0:1", "0:0"]'])
def test_a_list_of_heads_is_tried_first(make_settings, tmp_path, text):
    prior = tmp_path / "list"
    prior.write_text(text)
    changes = {"unit": "heads", "method": "ga", "max_heads": 2, "prior": prior, "objective": "nll"}
    found = search_layers(make_settings(tmp_path / "search", **changes, budget_evaluations=4))
    first, second = ("0:0", "0:1") if "#" in text else ("0:1", "0:0")
    tried = [each for each in journaled_heads(tmp_path / "search") if each]
    assert sorted(tried) == sorted([("3:1",), (first, "3:1"), (first,), (second,)])
    assert found["statistics"]["budget_spent"]
    assert found["search"]["prior"].startswith("list (")


def journaled_heads(folder: Path) -> list[tuple[str, ...]]:
    entries = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    return [tuple(entry["heads"]) for entry in entries if "heads" in entry]


@pytest.mark.parametrize(
    ("prior", "words"),
    [
        ("4:0", "names head 4:0, but there are 4 layers of 2 heads"),
        ("1:2", "names head 1:2"),
        ("11", "'11' is not LAYER:HEAD"),
        ("[11]", "'11' is not LAYER:HEAD"),
        ("# none\n", "has no heads: it needs names like 13:16"),
        ('{"single_layer_results": {"1": 0.5}}', "has no heads"),
        ('["3:1"', "is no list of heads"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(make_settings, tmp_path, prior, words):
    (tmp_path / "list").write_text(prior)
    with pytest.raises(SurgeryError, match=words.replace("[", r"\[")) as refused:
        search_layers(make_settings(tmp_path / "out", unit="heads", prior=tmp_path / "list"), dry_run=True)
    assert str(tmp_path / "list") in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unit": "heads", "max_layers": 2}, "count whole layers, but unit is heads. Leave them out"),
        ({"unit": "heads", "min_layers": 2}, "count whole layers"),
        ({"max_heads": 2}, "Give --unit heads"),
        ({"keep_mixer_heads": True}, "Give --unit heads"),
        ({"unit": "heads", "method": "removal"}, "The method removal begins with all layers"),
        ({"unit": "heads", "max_heads": 9}, "max_heads is 9, but there are 8 heads to choose from"),
        ({"unit": "neurons"}, "unit is 'neurons'"),
    ],
)
def test_what_does_not_fit_together_is_refused(make_settings, tmp_path, changes, words):
    with pytest.raises(SurgeryError, match=words):
        search_layers(make_settings(tmp_path / "out", **changes), dry_run=True)
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_to_build_the_best(base_dir, donor_dir, task_dir, tmp_path):
    """And a search over layers does not replace the result of a search over heads."""
    flags = ["--base", base_dir, "--donor", donor_dir, "--task", task_dir, "--output_dir", tmp_path / "out"]
    few = ["--method", "beam", "--max_heads", 2, "--limit", 2, "--device", "cpu"]
    result = run_command("search_layers", *flags, "--unit", "heads", *few)
    assert result.returncode == 0, result.stderr
    *_, command, last = result.stdout.splitlines()
    assert last.startswith("Result is in ")
    written = json.loads((tmp_path / "out" / "search_result.json").read_text())
    best = by_layer(written["final_results"][0]["heads"])
    words = command.partition("create_replaced_model_checkpoint.py ")[2].split()
    built = run_command("create_replaced_model_checkpoint", *words[:-1], tmp_path / "built")
    assert built.returncode == 0, built.stderr
    info = json.loads((tmp_path / "built" / "checkpoint_info.json").read_text())
    assert info["grafted_heads"] == {str(layer): heads for layer, heads in best.items()}
    singles = run_command("search_layers", *flags, "--unit", "heads", "--method", "singles", "--max_heads", 3)
    assert_refused(singles, "takes heads one by one: leave out --max_heads 3", code=2)
    singles = run_command("search_layers", *flags, "--unit", "heads", "--method", "singles", "--max_layers", 3)
    assert_refused(singles, "max_layers", "max_heads")
    layers = run_command("search_layers", *flags, "--method", "singles")
    assert_refused(layers, "has the result of another search", "unit: was heads, is now not given")


def test_from_a_checkpoint_on_heads_of_the_other_layers_are_added(checkpoint_dir, make_settings, task_dir, tmp_path):
    """Layers 1 and 3 of four are grafted."""
    start = {"start": checkpoint_dir, "base": "unaligned_llamba", "donor": None}
    settings = make_settings(tmp_path / "out", **start, unit="heads", method="singles")
    found = search_layers(settings)
    rows = {row["heads"][0]: row for row in found["final_results"]}
    assert rows.keys() == {"0:0", "0:1", "2:0", "2:1"}
    assert {row["kv_bytes_per_token"] for row in rows.values()} == {3 * 128}
    build_checkpoint(str(checkpoint_dir), [], settings.llama_layers_dir, tmp_path / "more", heads={2: [1]})
    evaluated = evaluate_checkpoint(tmp_path / "more", tasks=[str(task_dir)], batch_size=3)
    right = sum(task["score"] * task["questions"] for task in evaluated["tasks"].values())
    assert rows["2:1"]["accuracy"] == pytest.approx(right / evaluated["questions"])
