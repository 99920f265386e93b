"""The best combinations of a search, to be built.

In: search_result.json, or an older program's result file (search/result_files.py). Out: `Combination`s, the best first,
and the flags that say what they are to be built from.
"""

from pathlib import Path

from model_preparation.errors import SurgeryError
from model_preparation.jobs.combinations import Combination
from model_preparation.search.result_files import read_result


def best_of(path: Path, count: int) -> tuple[list[Combination], dict[str, str]]:
    """The `count` best combinations, or as many as there are, and flags of the builder with their values.

    Raises:
        SurgeryError: if the file cannot be read.
    """
    path = path.expanduser()
    found = read_result(path)
    if found.failures:
        print(f"{found.failures} entries of {path} have the score 0, which older programs gave what failed: left out")
    combinations = []
    for rank, each in enumerate(found.entries[:count], start=1):
        name = "llamba_replaced_" + "_".join(map(str, each.layers))
        is_mmlu = found.is_mmlu and each.score is not None and 0 <= each.score <= 1
        score = f"{each.score:.6g}" if is_mmlu else ""
        told = "" if each.score is None else f", {found.objective} {each.score:.4f}"
        combinations.append(Combination(each.layers, score, f"number {rank} of {path.name}{told}", name))
    flags = {"--base": found.base, "--llama_layers_dir": found.llama_layers_dir, "--tokenizer": found.tokenizer}
    return combinations, {flag: value for flag, value in flags.items() if value is not None}


def check_layers(path: Path) -> None:
    """Raise SurgeryError if the donor's layers are no longer where a result file says."""
    from model_preparation.checkpoint.layer_store import METADATA

    found = read_result(path.expanduser())
    if found.llama_layers_dir is None or (Path(found.llama_layers_dir) / METADATA).is_file():
        return
    raise SurgeryError(
        f"{path} was found with the donor's layers in {found.llama_layers_dir}, where they are no more. Extract them "
        f"again: python extract_layers.py --model_name {found.donor or 'DONOR'} --output_dir {found.llama_layers_dir}; "
        "or give others by --llama_layers_dir DIR."
    )
