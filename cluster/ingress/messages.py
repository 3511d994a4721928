"""Between journals and the messages of protos/head.proto. Decides nothing."""

from collections.abc import Iterable, Sequence

from cluster.ingress.journal import Finish, Journal, News
from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams, TokenLogprobs
from protos import head_pb2

_FINISH: dict[int, Finish | None] = {
    head_pb2.FINISH_NONE: None,
    head_pb2.FINISH_STOP: "stop",
    head_pb2.FINISH_LENGTH: "length",
}


def to_submit(request_id: int, journal: Journal) -> head_pb2.HeadRequest:
    """Ask a head for what the journal still lacks."""
    params = _to_params(journal.params, is_replay=bool(journal.emitted_ids))
    params.num_drafts = journal.num_drafts
    if journal.grammar is not None:
        params.grammar.CopyFrom(_to_grammar(journal.grammar))
    return head_pb2.HeadRequest(
        submit=head_pb2.Submit(
            request_id=request_id,
            token_ids=journal.prompt_ids,
            emitted_ids=journal.emitted_ids,
            params=params,
            client=journal.client,
            priority=journal.priority,
            cache_salt=journal.cache_salt,
        )
    )


def to_classify(request_id: int, prompt_ids: Sequence[int], client: str) -> head_pb2.HeadRequest:
    """Ask a head for the scores of a prompt."""
    return head_pb2.HeadRequest(
        submit=head_pb2.Submit(
            request_id=request_id,
            token_ids=prompt_ids,
            classify=head_pb2.Classify(),
            client=client,
        )
    )


def to_news(event: head_pb2.SequenceEvent) -> News:
    """What an event that tells of no failure says."""
    return News(
        tuple(event.token_ids),
        _FINISH[event.finish],
        logprobs=_to_logprobs(event.logprobs),
        prompt_logprobs=_to_logprobs(event.prompt_logprobs),
        num_reused=event.num_reused if event.HasField("num_reused") else None,
    )


def _to_params(params: SamplingParams, *, is_replay: bool) -> head_pb2.SamplingParams:
    """is_replay: tokens have come already, and with them what was asked of the prompt."""
    allowed = params.allowed_token_ids
    return head_pb2.SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        allowed_token_ids=None if allowed is None else head_pb2.TokenIds(token_ids=allowed),
        bad_words=[head_pb2.TokenIds(token_ids=word) for word in params.bad_words],
        logit_bias=[
            head_pb2.LogitBias(token_id=token_id, bias=bias) for token_id, bias in params.logit_bias
        ],
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        typical_p=params.typical_p,
        seed=params.seed,
        choice=params.choice,
        stop_token_ids=params.stop_token_ids,
        logprobs=params.logprobs,
        prompt_logprobs=None if is_replay else params.prompt_logprobs,
    )


def _to_grammar(spec: GrammarSpec) -> head_pb2.Grammar:
    return head_pb2.Grammar(kind=spec.kind, text=spec.text, continues_text=spec.continues_text)


def _to_logprobs(logprobs: Iterable[head_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(one.logprob, one.rank, tuple(one.top_ids), tuple(one.top_logprobs))
        for one in logprobs
    )
