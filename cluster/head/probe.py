"""The proof that a head is ready: a real forward pass that goes through every expert."""

import torch

from cluster.errors import ExpertFailedError
from model.batch import Span, build_batch
from model.decoder import Decoder
from model.experts import Experts, PendingRows
from model.kv_cache import KVCache
from model.router import Routing


class _EveryExpert:
    """Experts that ignore the router: row r goes to experts r, r + 1, ..."""

    def __init__(self, experts: Experts, num_experts: int) -> None:
        self._experts = experts
        self._num_experts = num_experts

    def dispatch(self, layer: int, x_TD: torch.Tensor, routing: Routing) -> PendingRows:
        num_rows, top_k = routing.expert_ids_TK.shape
        device = routing.expert_ids_TK.device
        rows_T1 = torch.arange(num_rows, device=device)[:, None]
        expert_ids_TK = (rows_T1 + torch.arange(top_k, device=device)) % self._num_experts
        weights_TK = torch.full_like(routing.weights_TK, 1 / top_k)
        return self._experts.dispatch(layer, x_TD, Routing(expert_ids_TK, weights_TK))


def pass_through_every_expert(decoder: Decoder, experts: Experts) -> None:
    """One forward pass with as many rows as there are experts, each through other experts.

    Raises ExpertFailedError when what comes out is not finite, or what the experts raise.
    """
    config = decoder.config
    num_rows = config.num_local_experts
    cache = KVCache(
        config, num_blocks=1, block_size=num_rows, dtype=decoder.dtype, device=decoder.device
    )
    span = Span([config.bos_token_id] * num_rows, start=0, blocks=[0])
    batch = build_batch([span], block_size=num_rows, device=decoder.device)
    logits = decoder.forward(batch, cache, _EveryExpert(experts, config.num_local_experts))
    if not logits.isfinite().all():
        raise ExpertFailedError("the probe through every expert gave values that are not finite")
