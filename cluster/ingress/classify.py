"""Scores of the heads to the reply of POST /classify, which has the shape of vLLM's."""

import asyncio
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from cluster.ingress.prepare import ApiSettings
from cluster.schema import Classification, ClassificationResult, Usage
from model.labels import probabilities

ClassifyIds = Callable[[Sequence[int]], Coroutine[Any, Any, tuple[float, ...]]]
"""Logits of one prompt, one for each label; cancelling aborts it at its head."""


async def classify_all(
    classify_ids: ClassifyIds, prompts: Sequence[Sequence[int]]
) -> list[tuple[float, ...]]:
    """Logits of all prompts, in their order. The failure of one ends all."""
    tasks = [asyncio.create_task(classify_ids(prompt)) for prompt in prompts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def classification(
    settings: ApiSettings,
    prompts: Sequence[Sequence[int]],
    logits: Sequence[Sequence[float]],
    *,
    use_activation: bool,
) -> Classification:
    """The reply. Without activation `probs` are the logits themselves."""
    labels = settings.labels
    assert labels is not None, "Preparer.check refuses the request"
    num_tokens = sum(len(prompt) for prompt in prompts)
    return Classification(
        id=f"classify-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=settings.model_id,
        data=[
            ClassificationResult(
                index=index,
                label=labels[own.index(max(own))],
                probs=probabilities(own, settings.problem_type) if use_activation else list(own),
                num_classes=len(own),
            )
            for index, own in enumerate(logits)
        ],
        usage=Usage(prompt_tokens=num_tokens, completion_tokens=0, total_tokens=num_tokens),
    )
