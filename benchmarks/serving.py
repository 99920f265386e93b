"""How fast vLLM serves a graft, against our own batched `generate`, and against a donor in vLLM.

Needs the package's extra `serve`. Prints tokens per second for requests of mixed lengths, sent at once; bytes of the
cache, as computed and as vLLM reports them; and peak memory. Each side is a separate process. The speed leaves out
imports, loading, and two first requests, for which vLLM compiles its sampler.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "model_preparation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--longest", type=int, default=400, help="tokens of the longest prompt")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--width", type=int, default=512, help="of random models; 0: use the embedded pair")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps({"vllm": by_vllm, "generate": by_generate}[args.side[0]](Path(args.side[1]), args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        graft, donor = make_models(Path(folder), args.width)
        found = {}
        for name, side, model in (
            ("graft in vLLM", "vllm", graft),
            ("donor in vLLM", "vllm", donor),
            ("graft, generate", "generate", graft),
        ):
            command = [sys.executable, __file__, *sys.argv[1:], "--side", side, str(model)]
            lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
            found[name] = json.loads(lines[-1])
            print(name, found[name], flush=True)
        for name in ("donor in vLLM", "graft, generate"):
            ratio = found["graft in vLLM"]["tokens_per_second"] / found[name]["tokens_per_second"]
            print(f"graft in vLLM / {name}: {ratio:.2f}")


def make_models(folder: Path, width: int) -> tuple[Path, Path]:
    """(graft, donor) as folders that transformers opens: random, 12 layers, 2 of them grafted; or the embedded pair."""
    if not width:
        from model_preparation import build_checkpoint, extract_layers

        extract_layers("tiny_llama", folder / "layers")
        build_checkpoint("tiny_llamba", [3, 7], folder / "layers", folder / "graft", format="hf")
        return folder / "graft", PACKAGE / "embedded/tiny_llama"
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from model_preparation.llamba import LlambaConfig
    from model_preparation.llamba import LlambaForCausalLM as Llamba
    from model_preparation.llamba.donor_kinds import KINDS

    torch.manual_seed(0)
    heads = width // 64
    llama = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        num_hidden_layers=12,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=64,
        intermediate_size=3 * width,
        max_position_embeddings=4096,
    )
    llamba = LlambaConfig(
        vocab_size=8192,
        d_model=width,
        n_layer=12,
        ssm_cfg={"d_state": 64, "n_v_heads": heads, "n_qk_heads": heads},
        mlp_cfg={"intermediate_size": 3 * width},
        llama_layers=[3, 7],
        llama_cfg=KINDS["llama"].settings(llama),
        max_position_embeddings=4096,
    )
    tokenizer = AutoTokenizer.from_pretrained(PACKAGE / "embedded/tiny_llama")
    for name, model in (("donor", LlamaForCausalLM(llama)), ("graft", Llamba(llamba))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "graft", folder / "donor"


def prompts_of(args: argparse.Namespace) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 54) for _ in range(rng.randint(1, args.longest))] for _ in range(args.requests)]


def by_vllm(folder: Path, args: argparse.Namespace) -> dict:
    from vllm import LLM, SamplingParams

    cache_bytes = 1 << 30
    llm = LLM(str(folder), dtype="float32", kv_cache_memory_bytes=cache_bytes, max_num_seqs=args.requests, seed=0)
    settings = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in prompts_of(args)]
    llm.generate(prompts[:2], settings, use_tqdm=False)
    started = time.perf_counter()
    llm.generate(prompts, settings, use_tqdm=False)
    result = speed(args, time.perf_counter() - started)
    cache = llm.llm_engine.vllm_config.cache_config
    result |= {"cache_blocks": cache.num_gpu_blocks, "block_tokens": cache.block_size}
    if cache.num_gpu_blocks:
        result["block_bytes"] = cache_bytes // cache.num_gpu_blocks
    del llm  # ends its processes, so that RUSAGE_CHILDREN has their memory
    return result | {"peak_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9}


def by_generate(folder: Path, args: argparse.Namespace) -> dict:
    import torch

    from model_preparation.llamba import LlambaForCausalLM

    torch.set_num_threads(1)  # as vLLM does on two cores: its other processes need the second core
    model = LlambaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = prompts_of(args)
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens, "do_sample": False}
    model.generate(ids[:2], attention_mask=mask[:2], pad_token_id=0, **settings)
    started = time.perf_counter()
    model.generate(ids, attention_mask=mask, pad_token_id=0, **settings)
    result = speed(args, time.perf_counter() - started)
    states, per_token = cache_bytes(model.config)
    result |= {"computed_state_bytes": states, "computed_kv_bytes_per_token": per_token}
    return result | {"peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def cache_bytes(config) -> tuple[int, int]:
    """Bytes in float32: (states of all Mamba layers per request, K/V of all grafted layers per token)."""
    ssm, grafted = config.ssm_cfg, len(config.llama_layers)
    channels = config.d_inner + 2 * ssm["n_qk_heads"] * ssm["d_state"]
    state = (ssm["d_conv"] - 1) * channels + config.d_inner * ssm["d_state"]
    return 4 * state * (config.n_layer - grafted), 4 * 2 * config.num_key_value_heads * config.head_dim * grafted


def speed(args: argparse.Namespace, seconds: float) -> dict:
    read = sum(map(len, prompts_of(args)))
    return {
        "seconds": round(seconds, 2),
        "tokens_per_second": round(args.requests * args.new_tokens / seconds, 1),
        "tokens_read": read,
    }


if __name__ == "__main__":
    main()
