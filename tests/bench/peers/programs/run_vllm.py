"""Measure vLLM's engine in this process. Run by the interpreter of vLLM's own environment.

python run_vllm.py PLAN.json ROWS.json
"""

import json
import random
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

VOCABULARY = range(300, 32000)


def main() -> None:
    plan_file, rows_file = map(Path, sys.argv[1:])
    plan: dict[str, Any] = json.loads(plan_file.read_text(encoding="utf-8"))
    longest = max([*plan["prefill"], plan["prompt_tokens"] + plan["new_tokens"]])
    engine = LLM(
        model=plan["model"],
        dtype="bfloat16",
        max_model_len=longest + 16,
        max_num_seqs=max(plan["sequences"]),
        max_num_batched_tokens=plan["pass_tokens"],
        enable_prefix_caching=False,
    ).llm_engine
    request_ids = count()
    numbers = random.Random(0)

    def seconds(num_sequences: int, prompt_tokens: int, new_tokens: int) -> tuple[float, float]:
        """Until every sequence has its first token, and from then until the last has ended."""
        sampling = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        for _ in range(num_sequences):
            prompt = {"prompt_token_ids": numbers.choices(VOCABULARY, k=prompt_tokens)}
            engine.add_request(str(next(request_ids)), prompt, sampling)
        begun: set[str] = set()
        started = time.perf_counter()
        first_s = 0.0
        while engine.has_unfinished_requests():
            begun |= {output.request_id for output in engine.step()}
            if not first_s and len(begun) == num_sequences:
                first_s = time.perf_counter() - started
        return first_s, time.perf_counter() - started - first_s

    rows: list[dict[str, Any]] = []

    def note(phase: str, size: int, tokens_per_s: float) -> None:
        rows.append({"phase": phase, "size": size, "tokens_per_s": tokens_per_s})
        print(phase, size, f"{tokens_per_s:.2f} tokens/s", flush=True)

    seconds(1, plan["prompt_tokens"], 4)  # warms up
    for size in plan["sequences"]:
        _, decode_s = seconds(size, plan["prompt_tokens"], 1 + plan["new_tokens"])
        note("decode", size, size * plan["new_tokens"] / decode_s)
    for size in plan["prefill"]:
        prefill_s, _ = seconds(1, size, 1)
        note("prefill", size, size / prefill_s)
    rows_file.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
