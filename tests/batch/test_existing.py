"""A folder that is complete is the checkpoint asked for, or what differs is named."""

import json
import shutil
from pathlib import Path

import pytest

from model_preparation import create_replaced_model_checkpoint
from model_preparation.batch.combinations import Combination
from model_preparation.batch.existing import differences, remarks

PAIR = Combination((1, 3), "", "", "tiny_1_3")
HUB = {"name": "unaligned_llamba", "hub": "huggingface", "id": "goombalab/Llamba-8B-untied-unaligned", "files": {}}


def flags(*given: object):
    parser = create_replaced_model_checkpoint.make_parser()
    return parser.parse_args(["--layers", "0", "--output_dir", "DIR", *map(str, given)])


def with_info(folder: Path, target: Path, **changes: object) -> Path:
    """A folder whose checkpoint_info.json is that of `folder` with changes."""
    target.mkdir()
    info = json.loads((folder / "checkpoint_info.json").read_text())
    (target / "checkpoint_info.json").write_text(json.dumps({**info, **changes}))
    return target


def test_the_one_asked_for_differs_in_nothing(checkpoint_dir, base_dir, layers_dir, tmp_path):
    given = ("--base", base_dir, "--llama_layers_dir", layers_dir, "--dtype", "float32")
    assert differences(checkpoint_dir, PAIR, flags(*given)) == []
    by_name = ("--base", "llamba", "--source", f"llamba={base_dir}", "--llama_layers_dir", tmp_path / "none")
    assert differences(checkpoint_dir, PAIR, flags(*by_name)) == []


@pytest.mark.parametrize(
    ("combination", "given", "words"),
    [
        (Combination((1, 2), "", "", "x"), [], "its layers are 1 3, not 1 2"),
        (PAIR, ["--format", "hf"], "its format is pt, not hf"),
        (PAIR, ["--dtype", "bfloat16"], "its dtype is float32, not bfloat16"),
        (PAIR, ["--base", "llamba"], "not llamba"),
        (PAIR, ["--base", "org/other"], "not org/other"),
    ],
)
def test_what_differs_is_named(checkpoint_dir, base_dir, tmp_path, combination, given, words):
    given = [*([] if "--base" in given else ["--base", base_dir]), *given, "--llama_layers_dir", tmp_path]
    [difference] = differences(checkpoint_dir, combination, flags(*given))
    assert words in difference


def test_both_formats_hold_each(checkpoint_dir, base_dir, tmp_path):
    folder = with_info(checkpoint_dir, tmp_path / "both", format="both")
    for name in ("pt", "hf", "both"):
        assert differences(folder, PAIR, flags("--base", base_dir, "--format", name)) == []


def test_a_base_of_another_name_or_size_is_another(checkpoint_dir, base_dir, tmp_path):
    moved = shutil.copytree(base_dir, tmp_path / base_dir.name)
    renamed = shutil.copytree(base_dir, tmp_path / "another")
    assert differences(checkpoint_dir, PAIR, flags("--base", moved)) == []
    assert "its base is" in differences(checkpoint_dir, PAIR, flags("--base", renamed))[0]
    with (moved / "pytorch_model.bin").open("ab") as file:
        file.write(b"0")
    assert f"not {moved}" in differences(checkpoint_dir, PAIR, flags("--base", moved))[0]


@pytest.mark.parametrize(
    ("asked", "same"),
    [
        ("unaligned_llamba", True),
        ("goombalab/Llamba-8B-untied-unaligned", True),
        ("huggingface:goombalab/Llamba-8B-untied-unaligned@main", True),
        ("modelscope:goombalab/Llamba-8B-untied-unaligned", False),
        ("llamba", False),
    ],
)
def test_a_base_from_a_hub_is_known_by_its_id(checkpoint_dir, tmp_path, asked, same):
    folder = with_info(checkpoint_dir, tmp_path / "hub", base_model=HUB)
    assert (differences(folder, PAIR, flags("--base", asked, "--llama_layers_dir", tmp_path)) == []) is same


def test_layers_of_another_donor_are_another_checkpoint(checkpoint_dir, base_dir, layers_dir, tmp_path):
    metadata = json.loads((layers_dir / "metadata.json").read_text())
    metadata["layers"]["3"]["sha256"] = "0" * 64
    (tmp_path / "metadata.json").write_text(json.dumps(metadata))
    [difference] = differences(checkpoint_dir, PAIR, flags("--base", base_dir, "--llama_layers_dir", tmp_path))
    assert f"not those in {tmp_path}" in difference


def test_another_score_or_description_is_only_remarked(checkpoint_dir, tmp_path):
    folder = with_info(checkpoint_dir, tmp_path / "scored", mmlu_score=0.5)
    assert remarks(folder, Combination((1, 3), "0.50", "a tiny pair", "x")) == []
    assert remarks(folder, Combination((1, 3), "0.6", "other", "x")) == [
        "its score is 0.5, the list's 0.6",
        "its description is 'a tiny pair'",
    ]
