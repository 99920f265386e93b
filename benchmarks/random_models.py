"""Makes bases and donors of real shapes with random weights, for the other benchmarks."""

import json
import multiprocessing
from pathlib import Path

# (d_model, n_layer, intermediate size, heads, K/V heads, tied embeddings). "1b", "3b" and "8b" are close to the shapes
# of the published Llambas and their donors. "small" is for trying the scripts.
SHAPES = {
    "small": (256, 8, 512, 32, 8, False),
    "half": (2048, 8, 8192, 32, 8, False),  # a checkpoint of 4.3 GB
    "1b": (2048, 16, 8192, 32, 8, False),
    "3b": (3072, 28, 8192, 32, 8, False),
    "7b": (4096, 24, 14336, 32, 8, False),  # a base of 13.8 GB, for disks on which 8b does not fit
    "8b": (4096, 32, 14336, 32, 8, False),
}
LAYERS = {
    "small": [1, 3, 5, 6],
    "half": [3, 5],
    "1b": [3, 6, 8, 10],
    "3b": [5, 9, 13, 18],
    "7b": [11, 13, 17, 21],
    "8b": [11, 13, 17, 21],
}

# A program that grafts in the naive way, with whole models in memory. Its result is in the variable `grafted`.
IN_MEMORY = """
import sys, torch
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.checkpoint.grafted_model import grafted_config
from model_preparation.checkpoint.layer_store import LayerStore
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
"""


def prepared(shape: str, folder: Path) -> tuple[Path, Path, list[str]]:
    """(base, extracted layers of the donor, indices of the layers) in `folder`. Missing models are made first."""
    base, layers_dir = folder / f"base_{shape}", folder / f"layers_{shape}"
    if not (layers_dir / "metadata.json").exists():
        # In a separate process: the peak memory of this process would count in every process that it starts.
        maker = multiprocessing.get_context("spawn").Process(target=make_models, args=(shape, folder, base, layers_dir))
        maker.start()
        maker.join()
    return base, layers_dir, [str(layer) for layer in LAYERS[shape]]


def make_models(shape: str, folder: Path, base: Path, layers_dir: Path) -> None:
    """Write random weights in the layouts of the published models, with one layer in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    from model_preparation import extract_layers
    from model_preparation.checkpoint.grafted_model import empty_model
    from model_preparation.checkpoint.model_configs import layer_shapes
    from model_preparation.llamba import LlambaConfig

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
