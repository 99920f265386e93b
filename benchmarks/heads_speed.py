"""The time of a layer with grafted heads, against the base's own layer and the donor's whole layer, in one run.

Weights are random, in the shape of SmolLM2-135M or of Llama-3.1-8B. Each layer decodes one token after --contexts other
tokens, with random states, keys and values. It also reads a text of --prefill tokens. Every variant has its turn in
each round. The figures are medians of processor time, so other programs disturb them less. The attention's cost is the
cost of a layer with all heads, minus the cost of the base's layer. The goal for a layer with some heads is the cost of
the base's layer, plus these heads' share of the attention's cost.

    OMP_NUM_THREADS=1 python benchmarks/heads_speed.py --shape smollm2
    OMP_NUM_THREADS=1 python benchmarks/heads_speed.py --shape 8b --dtype bfloat16 --prefill 128
"""

import argparse
import functools
import gc
import statistics
import time
from collections.abc import Callable

import torch
from decode_speed import SMOLLM2
from transformers import LlamaConfig

from model_preparation.checkpoint.llamba_init import llamba_config
from model_preparation.jobs.table import table
from model_preparation.llamba import LlambaConfig
from model_preparation.llamba.cache_bytes import kv_bytes_per_token
from model_preparation.llamba.cache_llamba import CACHE_NAME, LlambaCache
from model_preparation.llamba.donor_kinds import KINDS
from model_preparation.llamba.modeling_llamba import LlambaDecoderLayer

SHAPES = {
    "smollm2": SMOLLM2,
    "8b": {
        **SMOLLM2,
        **{"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
        "intermediate_size": 14336,
    },
}
BASE, LAYER = "base's layer", "donor's whole layer"


class Variant:
    """A layer: the base's, one with grafted heads, or the donor's."""

    def __init__(self, name: str, donor: LlamaConfig, heads: list[int], dtype: torch.dtype):
        fields = llamba_config(donor).file_fields()
        self.heads = heads
        whole = name == LAYER
        if heads or whole:
            fields |= {"llama_cfg": KINDS["llama"].settings(donor)}
            fields |= {"llama_layers": [0]} if whole else {"llama_heads": {"0": heads}}
        config = LlambaConfig.from_dict(fields)
        own = config.llama_config() if heads or whole else None
        if own is not None:
            own._attn_implementation = "sdpa"
        kind = KINDS["llama"].transformers_class
        layer = kind("DecoderLayer")(own, 0) if whole else LlambaDecoderLayer(config, 0, own)
        self.module = layer.to(dtype).eval()
        rotary = kind("RotaryEmbedding")(donor)  # a model computes these embeddings once for all layers
        self.positions = functools.cache(
            lambda start, end: rotary(torch.empty(0, dtype=dtype), torch.arange(start, end)[None])
        )
        self.config, self.dtype, self.whole = config, dtype, whole
        self.kv_bytes = kv_bytes_per_token(config, int(whole), dtype) if own is not None else 0
        self.weight_bytes = sum(each.nbytes for each in self.module.parameters())
        self.seconds: list[float] = []

    def run(self, hidden: torch.Tensor, place: int, cache: LlambaCache | None) -> torch.Tensor:
        positions = self.positions(place, place + hidden.shape[1])
        of_heads = {"attention_mask": None, "position_embeddings": positions}
        if self.whole:
            return self.module(hidden, **{CACHE_NAME: cache}, use_cache=cache is not None, **of_heads)
        return self.module(hidden, cache=cache, of_heads=of_heads if self.heads else None)

    def cache_of(self, context: int) -> LlambaCache:
        """A cache of `context` tokens, with random keys and values. Two random tokens make the states."""
        cache = LlambaCache(self.config)
        self.run(torch.randn(1, 2, self.config.d_model, dtype=self.dtype), 0, cache)
        layer = cache.layers[0]
        if getattr(layer, "keys", None) is not None:
            shape = (1, layer.keys.shape[1], context, layer.keys.shape[3])
            layer.keys, layer.values = (torch.randn(shape, dtype=self.dtype) for _ in range(2))
        return cache

    def decode(self, hidden: torch.Tensor, context: int, cache: LlambaCache) -> None:
        self.run(hidden, context, cache)
        layer = cache.layers[0]
        if getattr(layer, "keys", None) is not None:  # so that every step has the same context
            layer.keys, layer.values = layer.keys[:, :, :context], layer.values[:, :, :context]


def heads_of(donor: LlamaConfig) -> dict[str, list[int]]:
    """{name: heads}: one head in each of 1, 2 or all groups; more heads in two groups; all heads as the last entry."""
    total, groups = donor.num_attention_heads, donor.num_key_value_heads
    size = total // groups
    found = {f"{count} heads": [index * size for index in range(count)] for count in (1, 2, groups)}
    found[f"{size + 1} heads of 2 groups"] = list(range(size + 1))
    return {**found, f"{total} heads": list(range(total))}


def measure(
    variants: dict[str, Variant], turn: Callable[[Variant], Callable[[], None]], rounds: int, steps: int
) -> None:
    """Fill each variant's `seconds` with the processor time of one step, once per round."""
    steps_of = {name: turn(variant) for name, variant in variants.items()}
    for name, variant in variants.items():
        variant.seconds.clear()
        steps_of[name]()
    gc.disable()
    for _ in range(rounds):
        for name, variant in variants.items():
            started = time.process_time()
            for _ in range(steps):
                steps_of[name]()
            variant.seconds.append((time.process_time() - started) / steps)
    gc.enable()


def report(title: str, variants: dict[str, Variant], total: int) -> None:
    ms = {name: 1000 * statistics.median(variant.seconds) for name, variant in variants.items()}
    everything = f"{total} heads"
    attention, most = ms[everything] - ms[BASE], variants[everything].kv_bytes
    rows = []
    for name, variant in variants.items():
        shares: tuple = ("", "", "", "")
        if variant.heads:
            heads, cost = len(variant.heads) / total, (ms[name] - ms[BASE]) / attention
            goal = ms[name] / (ms[BASE] + heads * attention)
            shares = (f"{heads:.2f}", f"{variant.kv_bytes / most:.2f}", f"{cost:.2f}", f"{goal:.2f}")
        rows.append((name, f"{ms[name]:.3f}", f"{ms[name] / ms[BASE]:.2f}", *shares))
    print(f"\n{title}")
    heading = ("", "ms", "/ base's", "share of heads", "of K/V", "of attention's cost", "ms / (base + share of heads)")
    print(table(heading, rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--contexts", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--prefill", type=int, default=512, help="tokens")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    donor, dtype = LlamaConfig(**{**SHAPES[args.shape], "num_hidden_layers": 1}), getattr(torch, args.dtype)
    total = donor.num_attention_heads
    variants = {BASE: Variant(BASE, donor, [], dtype)}
    variants |= {name: Variant(name, donor, heads, dtype) for name, heads in heads_of(donor).items()}
    variants[LAYER] = Variant(LAYER, donor, [], dtype)
    print(f"{args.shape}, {args.dtype}, {args.threads} threads, {total} heads, {donor.num_key_value_heads} K/V heads")
    base = variants[BASE].weight_bytes
    rows = [
        (name, f"{each.weight_bytes:,}", f"{each.weight_bytes - base:,}" if each.heads else "", f"{each.kv_bytes:,}")
        for name, each in variants.items()
    ]
    print(table(("", "bytes of weights", "more than the base's", "K/V bytes per token"), rows))
    token, text = (torch.randn(1, length, donor.hidden_size, dtype=dtype) for length in (1, args.prefill))
    with torch.inference_mode():
        for context in args.contexts:

            def decoding(variant: Variant, context: int = context) -> Callable[[], None]:
                cache = variant.cache_of(context)
                return lambda: variant.decode(token, context, cache)

            measure(variants, decoding, args.rounds, 20 if args.shape == "smollm2" else 3)
            report(f"One token after {context}", variants, total)

        measure(variants, lambda variant: lambda: variant.run(text, 0, None), max(3, args.rounds // 3), 1)
        report(f"{args.prefill} tokens read", variants, total)


if __name__ == "__main__":
    main()
