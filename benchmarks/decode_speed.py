"""How the time to decode a token grows with the context: a base, a graft and the donor in one run.

All models have the shape of SmolLM2-135M and random weights. With --donor DIR, they have the shape of the
Llama in DIR. Then the donor, the grafted layers and all embeddings have that Llama's weights. Each model
reads the context into a cache of its own, segment by segment (prefill, with its own times). The last
--tokens tokens of each length are decoded greedily, in rounds that alternate between the models. Prints ms
per token (medians), the growth per 1,000 tokens of context (least squares), the bytes of each cache, and
ratios. The state of a Mamba layer has a fixed size. So the base's time per token should not grow. The
graft's growth should be the donor's growth times the graft's share of the attention layers.

    python benchmarks/decode_speed.py --donor local_models/smollm2
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from model_preparation.checkpoint.llamba_init import llamba_config
from model_preparation.llamba import LlambaConfig, LlambaForCausalLM
from model_preparation.llamba.cache_llamba import CACHE_NAME, LlambaCache
from model_preparation.llamba.donor_kinds import KINDS

SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SEGMENT = 512  # tokens of the context read at once
ROUNDS = 4


class Decoder:
    """A model, its cache, the token it wrote last, and the times so far."""

    def __init__(self, model, cache, vocabulary: int):
        self.model, self.cache = model.eval(), cache
        self.next = torch.randint(vocabulary, (1, 1), generator=torch.Generator().manual_seed(0))
        self.segment_speeds: list[float] = []  # tokens per second
        self.token_ms: dict[int, list[float]] = {}  # {length of the context: ms of each token}

    def read(self, ids: torch.Tensor) -> None:
        for part in ids.split(SEGMENT, dim=1):
            started = time.perf_counter()
            out = self.model(part, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1)
            self.next = out.logits[:, -1].argmax(-1, keepdim=True)
            if part.shape[1] > SEGMENT // 2:
                self.segment_speeds.append(part.shape[1] / (time.perf_counter() - started))

    def write(self, context: int, tokens: int) -> None:
        for _ in range(tokens):
            started = time.perf_counter()
            logits = self.model(self.next, **{CACHE_NAME: self.cache}, use_cache=True, logits_to_keep=1).logits
            self.next = logits[:, -1].argmax(-1, keepdim=True)
            self.token_ms.setdefault(context, []).append(1000 * (time.perf_counter() - started))

    def cache_bytes(self) -> tuple[int, int]:
        """(bytes of keys and values, bytes of states)."""
        keys_values = states = 0
        for layer in self.cache.layers:
            if getattr(layer, "keys", None) is not None:
                keys_values += layer.keys.nbytes + layer.values.nbytes
            else:
                states += sum(state.nbytes for state in layer.states() if state is not None)
        return keys_values, states


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", type=Path, metavar="DIR", help="a Llama's folder (default: random weights)")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 13, 17, 24], help="layers to graft")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--tokens", type=int, default=32, help="tokens decoded per length")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if args.tokens < ROUNDS or args.tokens % ROUNDS:
        parser.error(f"--tokens is {args.tokens}; a multiple of {ROUNDS} is needed")
    torch.set_num_threads(args.threads)
    donor = load_donor(args.donor).to(getattr(torch, args.dtype))
    limit = donor.config.max_position_embeddings
    contexts = sorted(args.contexts)
    if contexts[-1] > limit:
        parser.error(f"context {contexts[-1]} is beyond the donor's {limit} positions")
    if any(longer - shorter < args.tokens for shorter, longer in zip([0, *contexts], contexts, strict=False)):
        parser.error(f"the lengths must lie at least --tokens {args.tokens} apart")
    if max(longer - shorter for shorter, longer in zip([0, *contexts], contexts, strict=False)) < SEGMENT + args.tokens:
        parser.error(f"two of the lengths must lie {SEGMENT + args.tokens} apart, so that a whole segment is read")

    base, grafted = make_llamba(donor, []), make_llamba(donor, args.layers)
    vocabulary = donor.config.vocab_size
    decoders = {
        "base": Decoder(base, LlambaCache(base.config), vocabulary),
        "graft": Decoder(grafted, LlambaCache(grafted.config), vocabulary),
        "donor": Decoder(donor, DynamicCache(config=donor.config), vocabulary),
    }
    with torch.inference_mode():
        measure(decoders, contexts, args.tokens, vocabulary)
    share = len(args.layers) / donor.config.num_hidden_layers
    weights = f"weights of {args.donor.name}" if args.donor else "random weights"
    print(f"{weights}, {args.dtype}, {args.threads} threads, layers {args.layers} of the graft are the donor's")
    report(decoders, contexts, share)


def load_donor(folder: Path | None) -> LlamaForCausalLM:
    if folder is not None:
        return LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2))


@torch.no_grad()
def make_llamba(donor: LlamaForCausalLM, layers: list[int]) -> LlambaForCausalLM:
    """A Llamba with the donor's shape, embedding and `layers`. Its random mixers take as long as trained ones."""
    fields = llamba_config(donor.config).file_fields()
    if layers:
        fields["llama_layers"] = sorted(layers)
        fields["llama_cfg"] = KINDS["llama"].settings(donor.config)
    torch.manual_seed(0)
    model = LlambaForCausalLM(LlambaConfig.from_dict(fields)).to(donor.dtype)
    model.backbone.embedding.weight.copy_(donor.model.embed_tokens.weight)
    for layer in layers:
        model.backbone.layers[layer].load_state_dict(donor.model.layers[layer].state_dict())
    return model


def measure(decoders: dict[str, Decoder], contexts: list[int], tokens: int, vocabulary: int) -> None:
    """Fill every decoder's token_ms and segment_speeds."""
    text = torch.randint(vocabulary, (1, contexts[-1]), generator=torch.Generator().manual_seed(1))
    per_round = tokens // ROUNDS
    at = 0
    for context in contexts:
        start = context - per_round * ROUNDS  # the last tokens of the context are decoded, not read
        for decoder in decoders.values():
            decoder.read(text[:, at:start])
        for _ in range(ROUNDS):
            for decoder in decoders.values():
                decoder.write(context, per_round)
        at = context


def report(decoders: dict[str, Decoder], contexts: list[int], share: float) -> None:
    medians = {name: [statistics.median(d.token_ms[c]) for c in contexts] for name, d in decoders.items()}
    print(f"\n{'context':>8}" + "".join(f"{name + ', ms/token':>18}{'per second':>12}" for name in medians))
    for index, context in enumerate(contexts):
        cells = (f"{ms[index]:18.2f}{1000 / ms[index]:12.1f}" for ms in medians.values())
        print(f"{context:>8}" + "".join(cells))

    slopes = {name: np.polyfit(np.array(contexts) / 1000, ms, 1)[0] for name, ms in medians.items()}
    print("\nms per token and 1,000 tokens of context: " + ", ".join(f"{n} {s:.3f}" for n, s in slopes.items()))
    print(f"growth from {contexts[0]} to {contexts[-1]}: ", end="")
    print(", ".join(f"{name} x {ms[-1] / ms[0]:.2f}" for name, ms in medians.items()))
    of_donor = (slopes["graft"] - slopes["base"]) / slopes["donor"]
    print(f"growth, (graft - base) / donor {of_donor:.3f}; attention layers, graft / donor {share:.3f}")
    at_end = {name: ms[-1] for name, ms in medians.items()}
    print(f"at {contexts[-1]}: graft / donor {at_end['graft'] / at_end['donor']:.2f}, ", end="")
    print(f"base / donor {at_end['base'] / at_end['donor']:.2f}")

    print()
    for name, decoder in decoders.items():
        keys_values, states = decoder.cache_bytes()
        speeds = decoder.segment_speeds
        print(
            f"{name:<6} prefill, {len(speeds)} segments of up to {SEGMENT} tokens: {statistics.median(speeds):.0f}",
            end=" ",
        )
        print(f"tokens per second (the last one {speeds[-1]:.0f})", end="; ")
        print(f"K/V {keys_values / contexts[-1]:,.0f} bytes per token, states {states:,} bytes")


if __name__ == "__main__":
    main()
