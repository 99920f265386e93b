"""Building a checkpoint against copying the same bytes with cp, and against loading, replacing and saving with torch.

Prints seconds, peak resident memory and ratios, medians over --runs. The base and the donor's layers hold random
numbers in bfloat16; each run is a process of its own, imports included, and all that is written is synced.

    python benchmarks/build_speed.py --folder /mnt/scratch --shape 1b
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

# d_model, n_layer, intermediate, heads, KV heads, tied: those of the published Llambas and of their donors.
# "small" is for trying the scripts out.
SHAPES = {
    "small": (256, 8, 512, 32, 8, False),
    "1b": (2048, 16, 8192, 32, 8, False),
    "8b": (4096, 32, 14336, 32, 8, False),
}
LAYERS = {"small": [1, 3, 5, 6], "1b": [3, 6, 8, 10], "8b": [11, 13, 17, 21]}
PACKAGE = Path(__file__).resolve().parents[1] / "model_preparation"

NAIVE = """
import sys, torch
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.surgery.graft import grafted_config
from model_preparation.surgery.layer_store import LayerStore
base, layers_dir, out, *layers = sys.argv[1:]
layers = [int(layer) for layer in layers]
donor = LayerStore(layers_dir)
model = LlambaForCausalLM.from_pretrained(base)
grafted = LlambaForCausalLM._from_config(grafted_config(model.config, donor, layers))
state = model.state_dict()
for layer in layers:
    prefix = f"backbone.layers.{layer}."
    state = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    state |= {prefix + name: tensor for name, tensor in torch.load(donor.path(layer)).items()}
grafted.load_state_dict(state)
torch.save(grafted, out + "/model.pt")
torch.save(grafted.state_dict(), out + "/model_state_dict.pt")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to work: the disk that is measured")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--no_naive", action="store_true", help="leave out load-replace-save, which takes the most memory"
    )
    args = parser.parse_args()
    base, layers_dir = args.folder / f"base_{args.shape}", args.folder / f"layers_{args.shape}"
    if not (layers_dir / "metadata.json").exists():
        make_models(args.shape, args.folder, base, layers_dir)
    layers = [str(layer) for layer in LAYERS[args.shape]]

    results: dict[str, list[tuple[float, float]]] = {"build": [], "cp": [], "load, replace, save": []}
    for run in range(args.runs):
        out, copy = args.folder / "out", args.folder / "copy"
        command = [PACKAGE / "create_replaced_model_checkpoint.py", "--base", base, "--llama_layers_dir", layers_dir]
        results["build"].append(timed([*command, "--layers", *layers, "--output_dir", out]))
        size_bytes = sum((out / name).stat().st_size for name in ("model.pt", "model_state_dict.pt"))
        copy.mkdir()
        results["cp"].append(timed_copy(out, copy))
        shutil.rmtree(copy)
        shutil.rmtree(out)
        if not args.no_naive:
            out.mkdir()
            results["load, replace, save"].append(timed(["-c", NAIVE, base, layers_dir, out, *layers], sync=out))
            shutil.rmtree(out)
        print(f"run {run + 1}: {', '.join(f'{name} {v[-1][0]:.1f} s' for name, v in results.items() if v)}", flush=True)

    print(f"\n{args.shape}: {size_bytes / 1e9:.2f} GB written, medians of {args.runs}")
    build_seconds = statistics.median(seconds for seconds, _ in results["build"])
    for name, measured in results.items():
        if measured:
            seconds = statistics.median(seconds for seconds, _ in measured)
            peak = max(peak for _, peak in measured)
            print(
                f"{name:<20} {seconds:7.1f} s   {peak:6.2f} GB resident   build / this = {build_seconds / seconds:.2f}"
            )


def timed(arguments: list, sync: Path | None = None) -> tuple[float, float]:
    """Run Python with `arguments`; (seconds until all is on the disk, peak resident memory in GB)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(process.stderr.read().decode() if process.stderr else "failed")
    if sync is not None:
        sync_folder(sync)
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e9


def timed_copy(source: Path, target: Path) -> tuple[float, float]:
    started = time.perf_counter()
    subprocess.run(["cp", source / "model.pt", source / "model_state_dict.pt", target], check=True)
    sync_folder(target)
    return time.perf_counter() - started, 0.0


def sync_folder(folder: Path) -> None:
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def make_models(shape: str, folder: Path, base: Path, layers_dir: Path) -> None:
    """Random weights in the layouts that are published, one layer in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from model_preparation import extract_layers
    from model_preparation.llamba import LlambaConfig
    from model_preparation.surgery.graft import empty_model
    from model_preparation.surgery.layer_store import layer_shapes

    width, n_layer, intermediate, heads, kv_heads, tied = SHAPES[shape]
    config = LlambaConfig(
        d_model=width, n_layer=n_layer, tie_embeddings=tied, mlp_cfg={"intermediate_size": intermediate}
    )
    donor_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        num_hidden_layers=n_layer,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        dtype="bfloat16",
    )

    def random(names_and_shapes) -> dict:
        return {name: torch.randn(size, dtype=torch.bfloat16) * 0.02 for name, size in names_and_shapes}

    def save_shards(target: Path, shards: list) -> None:
        target.mkdir(parents=True)
        weight_map = {}
        for number, shard in enumerate(shards):
            name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            save_file(random(shard), target / name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys([tensor for tensor, _ in shard], name)
        (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    parameters = [(name, parameter.shape) for name, parameter in empty_model(config).named_parameters()]
    prefixes = ["backbone.embedding", *(f"backbone.layers.{i}." for i in range(n_layer)), "backbone.final", "lm_head"]
    save_shards(base, [[item for item in parameters if item[0].startswith(prefix)] for prefix in prefixes])
    config.save_pretrained(base)
    words = {str(i): i for i in range(1000)} | {"<unk>": 1000}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")))
    tokenizer.add_special_tokens({"eos_token": "<unk>"})
    tokenizer.save_pretrained(base)

    donor = folder / f"donor_{shape}"
    layer = list(layer_shapes(donor_config).items())
    named = [[(f"model.layers.{index}.{name}", size) for name, size in layer] for index in LAYERS[shape]]
    save_shards(donor, named)
    donor_config.save_pretrained(donor)
    extract_layers(str(donor), layers_dir, layers=LAYERS[shape])


if __name__ == "__main__":
    main()
