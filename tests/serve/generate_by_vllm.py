"""`python generate_by_vllm.py FILE.json`: vLLM's greedy answers to the cases in the file go into FILE.out.

A case is a model's folder, options for vLLM, prompts, and a number of new tokens. The result is answers, or
the error with which vLLM refused the case. One process runs all cases and the engine, because imports take
most of the time of a start.
"""

import gc
import json
import os
import sys
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no second process, which would import everything again


def main() -> None:
    path = Path(sys.argv[1])
    found = []
    for case in json.loads(path.read_text()):
        found.append(run(case))
        gc.collect()  # one model in memory at a time
    path.with_suffix(".out").write_text(json.dumps(found))


def run(case: dict) -> dict:
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "kv_cache_memory_bytes": 256 << 20, "disable_log_stats": False, **case["options"]}
    try:
        llm = LLM(case["folder"], **options)
    except ValueError as error:
        return {"error": str(error)}
    settings = SamplingParams(temperature=0, max_tokens=case["new_tokens"], logprobs=0, ignore_eos=True)
    before = preemptions(llm)
    answers = []
    for request in llm.generate([{"prompt_token_ids": ids} for ids in case["prompts"]], settings, use_tqdm=False):
        ids = list(request.outputs[0].token_ids)
        pairs = zip(ids, request.outputs[0].logprobs, strict=True)
        answers.append({"ids": ids, "logprobs": [by_token[token].logprob for token, by_token in pairs]})
    return {"answers": answers, "preemptions": preemptions(llm) - before}


def preemptions(llm) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


if __name__ == "__main__":
    main()
