"""`python generate_by_vllm.py FILE.json`: vLLM's greedy answers to the prompts in the file go into FILE.out.

A file of its own, as vLLM starts processes that import it.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    path = Path(sys.argv[1])
    given = json.loads(path.read_text())
    llm = LLM(given["folder"], dtype="float32", kv_cache_memory_bytes=64 << 20, max_num_seqs=8)
    settings = SamplingParams(temperature=0, max_tokens=given["new_tokens"], logprobs=0, ignore_eos=True)
    answers = []
    for request in llm.generate([{"prompt_token_ids": ids} for ids in given["prompts"]], settings, use_tqdm=False):
        ids = list(request.outputs[0].token_ids)
        pairs = zip(ids, request.outputs[0].logprobs, strict=True)
        answers.append({"ids": ids, "logprobs": [by_token[token].logprob for token, by_token in pairs]})
    path.with_suffix(".out").write_text(json.dumps(answers))
