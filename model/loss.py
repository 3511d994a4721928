"""What training would minimise, as numbers: cross-entropy and the experts' load balance.

Values only: the decoder runs without gradients.

Shape suffixes: T tokens, V vocabulary, E experts, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.errors import PromptError

IGNORED = -100
"""The label of a token that does not count, as everywhere in torch and transformers."""


@dataclass(frozen=True)
class ModelOutput:
    """What one forward pass gave. Rows are the tokens of all sequences, one after the other.

    loss:          cross-entropy, and the weighted aux_loss where there is one; None without labels.
    aux_loss:      load-balancing loss over all layers; None unless router logits were asked for.
    hidden_states: (T, D) each: the embeddings, every layer's output, the last one normed.
    router_logits: (T, E) float32 of each layer.
    """

    logits_TV: Tensor
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


def next_token_loss(logits_TV: Tensor, labels: Sequence[Sequence[int]]) -> Tensor:
    """Mean cross-entropy of every sequence's next tokens; NaN where no label counts.

    labels: of each sequence one per token, usually its own ids; they are shifted here, so that row
    t is judged by label t + 1. `IGNORED` leaves a token out.
    Raises PromptError for labels that are too many, too few or out of vocabulary.
    """
    num_labels = sum(len(own) for own in labels)
    if num_labels != logits_TV.shape[0]:
        raise PromptError(f"{num_labels} labels do not fit {logits_TV.shape[0]} tokens")
    vocab_size = logits_TV.shape[1]
    for label in (label for own in labels for label in own):
        if label != IGNORED and not 0 <= label < vocab_size:
            raise PromptError(f"label {label} is out of vocabulary ({vocab_size} ids)")
    shifted = [label for own in labels for label in [*own[1:], IGNORED]]
    return F.cross_entropy(
        logits_TV.float(), logits_TV.new_tensor(shifted, dtype=torch.int64), ignore_index=IGNORED
    )


def load_balancing_loss(router_logits: Sequence[Tensor], *, top_k: int) -> Tensor:
    """Equations 4 to 6 of Switch Transformers (2101.03961), over the tokens of all layers.

    router_logits: (T, E) of each layer. The result is top_k where the experts share the tokens
    evenly, and at most E. Follows transformers' `load_balancing_loss_func`.
    """
    probabilities_TE = torch.cat(tuple(router_logits)).softmax(dim=-1)
    num_tokens, num_experts = probabilities_TE.shape
    chosen_TK = probabilities_TE.topk(top_k, dim=-1).indices
    tokens_E = chosen_TK.flatten().bincount(minlength=num_experts)
    share_E = tokens_E.to(probabilities_TE.dtype) / num_tokens
    return num_experts * (share_E * probabilities_TE.mean(dim=0)).sum()
