"""Between the messages of protos/head.proto and the head's own types. Decides nothing."""

from collections.abc import Iterable
from collections.abc import Sequence as Many

from cluster.head.classification import Classification
from cluster.head.drafts import LookupDrafter
from cluster.head.events import Event, Load
from cluster.head.sequence import Sequence
from model.grammar_spec import GrammarSpec
from model.sampling_params import SamplingParams, TokenLogprobs
from protos import head_pb2

_FINISH = {
    None: head_pb2.FINISH_NONE,
    "stop": head_pb2.FINISH_STOP,
    "length": head_pb2.FINISH_LENGTH,
}


def to_sequence(submit: head_pb2.Submit) -> Sequence:
    """What an ingress asks for, but for its grammar (`to_spec`). Raises SamplingError."""
    if submit.WhichOneof("task") == "classify":
        return Classification(
            list(submit.token_ids), client=submit.client, cache_salt=submit.cache_salt
        )
    num_drafts = submit.params.num_drafts
    return Sequence(
        list(submit.token_ids),
        _to_params(submit.params),
        tuple(submit.emitted_ids),
        client=submit.client,
        priority=submit.priority,
        cache_salt=submit.cache_salt,
        drafter=LookupDrafter(num_drafts) if num_drafts else None,
    )


def to_spec(submit: head_pb2.Submit) -> GrammarSpec | None:
    """The grammar that an answer must follow, if any. Raises GrammarError."""
    if not submit.params.HasField("grammar"):
        return None
    asked = submit.params.grammar
    return GrammarSpec(asked.kind, asked.text, asked.continues_text)  # type: ignore[arg-type]


def to_step_events(events: Many[Event]) -> head_pb2.StepEvents:
    """The news of one step for one ingress."""
    return head_pb2.StepEvents(events=[_to_sequence_event(event) for event in events])


def to_load(load: Load, *, is_draining: bool) -> head_pb2.Load:
    """How busy this head is, for the ingresses."""
    return head_pb2.Load(
        num_requests=load.num_requests,
        num_waiting=load.num_waiting,
        num_free_tokens=load.num_free_tokens,
        num_cache_tokens=load.num_cache_tokens,
        is_draining=is_draining,
    )


def _to_params(params: head_pb2.SamplingParams) -> SamplingParams:
    def optional(field: str) -> int | None:
        return getattr(params, field) if params.HasField(field) else None

    return SamplingParams(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        allowed_token_ids=(
            tuple(params.allowed_token_ids.token_ids)
            if params.HasField("allowed_token_ids")
            else None
        ),
        bad_words=tuple(tuple(word.token_ids) for word in params.bad_words),
        logit_bias=tuple((bias.token_id, bias.bias) for bias in params.logit_bias),
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
        stop_token_ids=tuple(params.stop_token_ids),
        logprobs=optional("logprobs"),
        prompt_logprobs=optional("prompt_logprobs"),
    )


def _to_sequence_event(event: Event) -> head_pb2.SequenceEvent:
    if event.error is None:
        finish = _FINISH[event.finish]
    else:
        finish = head_pb2.FINISH_INVALID if event.is_refusal else head_pb2.FINISH_ERROR
    return head_pb2.SequenceEvent(
        request_id=event.key,
        token_ids=event.token_ids,
        finish=finish,
        error=event.error or "",
        param=event.param or "",
        logprobs=_to_logprobs(event.logprobs),
        prompt_logprobs=_to_logprobs(event.prompt_logprobs),
        num_reused=event.num_reused,
        scores=event.scores,
    )


def _to_logprobs(logprobs: Iterable[TokenLogprobs]) -> list[head_pb2.TokenLogprobs]:
    return [
        head_pb2.TokenLogprobs(
            logprob=one.logprob,
            rank=one.rank,
            top_ids=one.top_ids,
            top_logprobs=one.top_logprobs,
        )
        for one in logprobs
    ]
