"""If a complete folder is not the checkpoint that was asked for, what differs is named."""

import json
import shutil
from pathlib import Path

import pytest

from model_preparation import create_replaced_model_checkpoint
from model_preparation.jobs.build_many import differences, remarks
from model_preparation.jobs.combinations import Combination

PAIR = Combination((1, 3), "", "", "tiny_1_3")
HUB = {"hub": "huggingface", "id": "goombalab/Llamba-8B-untied-unaligned", "revision": "a" * 40, "files": {}}


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
        (Combination((1, 2), "", "", "x"), [], "layers: was 1 3, is now 1 2"),
        (PAIR, ["--format", "hf"], "format: was pt, is now hf"),
        (PAIR, ["--dtype", "bfloat16"], "dtype: was float32, is now bfloat16"),
        (PAIR, ["--base", "llamba"], "base id: was local:tiny-llamba, is now huggingface:cartesia-ai/Llamba-8B-untied"),
        (PAIR, ["--base", "org/other"], "base id: was local:tiny-llamba, is now local:org/other"),
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


def test_a_base_is_known_by_its_contents(checkpoint_dir, base_dir, tmp_path):
    moved = shutil.copytree(base_dir, tmp_path / "under another name")
    assert differences(checkpoint_dir, PAIR, flags("--base", moved)) == []
    weights = bytearray((moved / "pytorch_model.bin").read_bytes())
    weights[len(weights) // 2] ^= 1  # as many bytes
    (moved / "pytorch_model.bin").write_bytes(weights)
    by_name = ("--base", "llamba", "--source", f"llamba={moved}")
    assert differences(checkpoint_dir, PAIR, flags(*by_name)) == [
        f"base pytorch_model.bin: the content has changed in {moved}"
    ]


def test_another_tokenizer_is_another_checkpoint(checkpoint_dir, base_dir, layers_dir, tmp_path):
    given = ("--base", base_dir, "--llama_layers_dir", layers_dir, "--tokenizer")
    other = shutil.copytree(layers_dir / "tokenizer", tmp_path / "other")
    assert differences(checkpoint_dir, PAIR, flags(*given, other)) == []
    (other / "tokenizer_config.json").write_text((other / "tokenizer_config.json").read_text().replace("<pad>", "<s>"))
    assert differences(checkpoint_dir, PAIR, flags(*given, other)) == ["tokenizer: the content has changed"]


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
    layers = shutil.copytree(layers_dir, tmp_path / "layers")
    given = flags("--base", base_dir, "--llama_layers_dir", layers)
    metadata = json.loads((layers / "metadata.json").read_text())
    metadata["layers"]["3"]["sha256"] = "0" * 64  # the same tensors in a file of other bytes
    (layers / "metadata.json").write_text(json.dumps(metadata))
    assert differences(checkpoint_dir, PAIR, given) == []
    metadata["layers"]["3"] = metadata["layers"]["1"]
    (layers / "metadata.json").write_text(json.dumps(metadata))
    assert differences(checkpoint_dir, PAIR, given) == [f"donor's layer 3: the content has changed in {layers}"]


def test_another_score_or_description_is_only_remarked(checkpoint_dir, tmp_path):
    folder = with_info(checkpoint_dir, tmp_path / "scored", mmlu_score=0.5)
    assert remarks(folder, Combination((1, 3), "0.50", "a tiny pair", "x")) == []
    assert remarks(folder, Combination((1, 3), "0.6", "other", "x")) == [
        "its score is 0.5, but 0.6 in the list",
        "its description is 'a tiny pair'",
    ]
