"""The speed of LlambaMixer on a CPU, against transformers' Mamba2Mixer, a Llama layer, and its own two projections.

At each size, all modules have the same width and heads of 64. Both mixers have the state size 64. The Llama
layer and the Mamba block have the same MLP width. Weights are random, and there are no gradients. The modules
run in turns in one process, and their medians are compared. Mamba2Mixer runs its PyTorch path, with as many
groups as heads and no activation after the convolution. So both projections and the convolution have the same
shapes as in a Llamba.
The projections alone (in_proj, then out_proj) are the floor. A Llama layer is compared with the whole block (mixer and
MLP). A decode step is one token for each row of the batch. The first step follows a prompt of 128 tokens.

    OMP_NUM_THREADS=1 python benchmarks/mixer_speed.py
    python benchmarks/mixer_speed.py --threads 2 --dtypes bfloat16
    python benchmarks/mixer_speed.py --quick
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from transformers import DynamicCache, LlamaConfig, Mamba2Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from model_preparation.llamba import LlambaConfig
from model_preparation.llamba.cache_llamba import LlambaCache
from model_preparation.llamba.modeling_llamba import LlambaDecoderLayer

HEAD_DIM = STATE = 64
CHUNK = 128  # Llamba's. With Mamba2Mixer's default of 256, it would compute twice as much for 128 tokens
PROMPT = 128  # tokens before a decode step
STEPS = 10  # decode steps per measurement
GOALS = {  # (for the geometric mean over the sizes, for the worst size); higher is better. "llama" has no goal.
    "float32": {"mamba2": (1.4, 1.0), "floor": (1 / 1.6, 0), "decode": (1.7, 1.0)},
    "bfloat16": {"mamba2": (2.0, 1.0), "floor": (1 / 1.6, 0), "decode": (1.7, 1.0)},
}
MEANING = {
    "mamba2": "Mamba2Mixer's time / LlambaMixer's",
    "floor": "the projections' time / LlambaMixer's",
    "llama": "LlamaDecoderLayer's time / LlambaDecoderLayer's",
    "decode": "Mamba2Mixer's time / LlambaMixer's, one step",
}


def make_layers(width: int, dtype: torch.dtype) -> SimpleNamespace:
    """Our Mamba block, Mamba2's mixer and a Llama layer, all of one width, and their configs."""
    heads, intermediate = width // HEAD_DIM, 8 * width // 3
    ssm = {"d_state": STATE, "n_v_heads": heads, "n_qk_heads": heads, "chunk_size": CHUNK}
    mlp = {"intermediate_size": intermediate}
    llamba = LlambaConfig(vocab_size=64, d_model=width, n_layer=1, ssm_cfg=ssm, mlp_cfg=mlp)
    mamba2 = Mamba2Config(
        hidden_size=width, expand=1, num_heads=heads, head_dim=HEAD_DIM, state_size=STATE, n_groups=heads
    )
    mamba2.num_hidden_layers, mamba2.chunk_size, mamba2.hidden_act = 1, CHUNK, "linear"
    llama = LlamaConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=1, intermediate_size=intermediate
    )
    llama._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return SimpleNamespace(
        configs={"llamba": llamba, "mamba2": mamba2},
        block=LlambaDecoderLayer(llamba, 0).to(dtype).eval(),
        mamba2=Mamba2Mixer(mamba2, 0).to(dtype).eval(),
        llama=LlamaDecoderLayer(llama, 0).to(dtype).eval(),
        rotary=LlamaRotaryEmbedding(llama),
    )


def sides_of(layers: SimpleNamespace, batch: int, length: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """{name: what to time on a sequence}."""
    mixer = layers.block.mixer
    hidden = torch.randn(batch, length, mixer.in_proj.in_features, dtype=dtype)
    inner = torch.randn(batch, length, mixer.d_inner, dtype=dtype)
    positions = layers.rotary(hidden, torch.arange(length).unsqueeze(0))
    return {
        "ours": lambda: mixer(hidden),
        "mamba2": lambda: layers.mamba2(hidden),
        "floor": lambda: (mixer.in_proj(hidden), mixer.out_proj(inner)),
        "block": lambda: layers.block(hidden),
        "llama": lambda: layers.llama(hidden, position_embeddings=positions),  # without a mask SDPA is causal
    }


def decode_sides_of(layers: SimpleNamespace, batch: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """{name: what to time for STEPS steps of decoding}. Each side continues its own cache."""
    mixer = layers.block.mixer
    width = mixer.in_proj.in_features
    prompt, token = torch.randn(batch, PROMPT, width, dtype=dtype), torch.randn(batch, 1, width, dtype=dtype)
    inner = torch.randn(batch, 1, mixer.d_inner, dtype=dtype)
    caches = {
        "ours": LlambaCache(layers.configs["llamba"]),
        "mamba2": DynamicCache(config=layers.configs["mamba2"]),
    }
    forwards = {"ours": mixer, "mamba2": layers.mamba2}

    def steps_of(name: str) -> Callable[[], None]:
        forwards[name](prompt, caches[name])

        def run() -> None:
            for _ in range(STEPS):
                forwards[name](token, caches[name])

        return run

    def floor() -> None:
        for _ in range(STEPS):
            mixer.in_proj(token), mixer.out_proj(inner)

    return {"ours": steps_of("ours"), "mamba2": steps_of("mamba2"), "floor": floor}


def medians(sides: dict[str, Callable[[], object]], seconds_wanted: float) -> dict[str, float]:
    """Median seconds of each side. After a warm-up, the sides take turns for `seconds_wanted`, 3 to 50 times."""
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    until = time.perf_counter() + seconds_wanted
    rounds = 0
    while rounds < 3 or (time.perf_counter() < until and rounds < 50):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
        rounds += 1
    return {name: statistics.median(values) for name, values in seconds.items()}


def verdict(dtype: str, kind: str, ratios: list[float]) -> str:
    """One line: the geometric mean, the worst size, and whether they reach their goals."""
    mean, worst = math.exp(statistics.fmean(map(math.log, ratios))), min(ratios)
    found = f"{dtype:<9} {MEANING[kind]:<52} mean {mean:.2f}, worst {worst:.2f}"
    if kind not in GOALS[dtype]:
        return found
    mean_goal, worst_goal = GOALS[dtype][kind]
    met = "met" if mean >= mean_goal and worst >= worst_goal else "NOT met"
    goal = f"goal {mean_goal:.3g}" + (f", never below {worst_goal:.3g}" if worst_goal else "")
    return f"{found} ({goal}: {met})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, help="threads torch may use (default: torch's, see OMP_NUM_THREADS)")
    parser.add_argument("--dtypes", nargs="+", choices=GOALS, default=list(GOALS))
    parser.add_argument("--widths", nargs="+", type=int, default=[576, 1024], help="multiples of 64")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--seconds", type=float, default=3, help="per size (decode: 1/3); at least 3 rounds")
    parser.add_argument("--quick", action="store_true", help="batch 1, 128 and 512 tokens, one second per size")
    args = parser.parse_args()
    if args.quick:
        args.batches, args.lengths, args.seconds = [1], [128, 512], 1
    if args.threads:
        torch.set_num_threads(args.threads)
    if any(width % HEAD_DIM or width <= 0 for width in args.widths):
        sys.exit(f"--widths {args.widths}: each must be a multiple of {HEAD_DIM}")

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads of {os.cpu_count()} cores")
    print("thousand tokens per second (decode: steps per second); ratios above 1: ours is faster\n")
    print(f"{'':<28}{'ours':>8}{'mamba2':>8}{'floor':>8}{'block':>8}{'llama':>8}  ours/mamba2  ours/floor  block/llama")
    ratios: dict[tuple[str, str], list[float]] = {}
    for dtype, width in itertools.product(args.dtypes, args.widths):
        layers = make_layers(width, getattr(torch, dtype))
        for batch, length in itertools.product(args.batches, args.lengths):
            seconds = medians(sides_of(layers, batch, length, getattr(torch, dtype)), args.seconds)
            found = [seconds["mamba2"] / seconds["ours"], seconds["floor"] / seconds["ours"]]
            found.append(seconds["llama"] / seconds["block"])
            for kind, ratio in zip(("mamba2", "floor", "llama"), found, strict=True):
                ratios.setdefault((dtype, kind), []).append(ratio)
            speeds = "".join(f"{batch * length / value / 1000:8.1f}" for value in seconds.values())
            row = f"{dtype} {width}, {batch} x {length}"
            print(f"{row:<28}{speeds}{found[0]:13.2f}{found[1]:12.2f}{found[2]:13.2f}", flush=True)
        for batch in args.batches:
            seconds = medians(decode_sides_of(layers, batch, getattr(torch, dtype)), args.seconds / 3)
            found = [seconds["mamba2"] / seconds["ours"], seconds["floor"] / seconds["ours"]]
            ratios.setdefault((dtype, "decode"), []).append(found[0])
            speeds = "".join(f"{STEPS / value:8.0f}" for value in seconds.values())
            print(f"{f'{dtype} {width}, decode {batch}':<28}{speeds}{found[0]:29.2f}{found[1]:12.2f}", flush=True)
    print("\ngeometric means over the sizes")
    for (dtype, kind), values in ratios.items():
        print(verdict(dtype, kind, values))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
