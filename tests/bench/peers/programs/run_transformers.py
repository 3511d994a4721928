"""Measure transformers in this process. Run by the interpreter of its own environment.

python run_transformers.py PLAN.json ROWS.json
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

KERNEL = "eager"
"""Of its three for experts: in one round of short trials at every row below it was the fastest but
once, when grouped_mm was; batched_mm copies the weights of every row's experts, 700 MB a row."""

WARM_UP_TOKENS = 64
"""Long enough that every expert has rows."""


def main() -> None:
    plan_file, rows_file = map(Path, sys.argv[1:])
    plan: dict[str, Any] = json.loads(plan_file.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    torch.set_num_threads(plan["threads"])
    model = AutoModelForCausalLM.from_pretrained(plan["model"], dtype=torch.bfloat16).eval()
    model.set_experts_implementation(KERNEL)

    def prompt(num_sequences: int, num_tokens: int) -> torch.Tensor:
        return torch.randint(300, 32000, (num_sequences, num_tokens))

    @torch.inference_mode()
    def prefill_s(num_tokens: int) -> float:
        ids = prompt(1, num_tokens)
        started = time.perf_counter()
        model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
        return time.perf_counter() - started

    @torch.inference_mode()
    def decode_s(num_sequences: int, prompt_tokens: int, new_tokens: int) -> float:
        cache = DynamicCache(config=model.config)
        ids = prompt(num_sequences, prompt_tokens)
        started = 0.0
        for step in range(new_tokens + 1):  # the first is the prompt's
            if step == 1:
                started = time.perf_counter()
            logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)
        return time.perf_counter() - started

    rows: list[dict[str, Any]] = []

    def note(phase: str, size: int, tokens_per_s: float) -> None:
        rows.append({"phase": phase, "size": size, "tokens_per_s": tokens_per_s})
        print(phase, size, f"{tokens_per_s:.2f} tokens/s", flush=True)

    prefill_s(WARM_UP_TOKENS)
    new_tokens = plan["new_tokens"]
    for size in plan["sequences"]:
        seconds = decode_s(size, plan["prompt_tokens"], new_tokens)
        note("decode", size, size * new_tokens / seconds)
    for size in plan["prefill"]:
        note("prefill", size, size / prefill_s(size))
    rows_file.write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
