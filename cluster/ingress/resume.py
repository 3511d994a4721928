"""Going on with an answer whose stream broke off, of which nothing is kept here.

The caller sends the ids that it has. They go into the journal as if a head had emitted them, so a
head draws what follows as it would have drawn it: positions, penalties, min_tokens, max_tokens and
grammars count them. `AnswerText` reads them first, so that stop strings and characters that they
begin are found, and tells nothing of them.
"""

from cluster.errors import RequestError
from cluster.ingress.journal import Journal
from cluster.schema import GenerationRequest


def resume(body: GenerationRequest, journals: list[Journal], *, vocab_size: int) -> None:
    """Put what the caller has of its answer into the one journal. Raises RequestError."""
    ids = body.resume_token_ids
    if not ids:
        return
    (journal, *others), params = journals, journals[0].params
    if others or not body.stream or params.logprobs is not None:
        raise _refused("only one streamed choice without log-probabilities can go on")
    if max(ids) >= vocab_size:
        raise _refused(f"{max(ids)} is out of vocabulary ({vocab_size} ids)")
    ends = sorted(set(ids).intersection(params.stop_token_ids))
    if ends:
        raise _refused(f"{ends[0]} is an end token: the answer has ended")
    if len(ids) >= params.max_tokens:
        raise _refused(f"of {params.max_tokens} tokens {len(ids)} are there: the answer has ended")
    journal.emitted_ids = list(ids)


def _refused(problem: str) -> RequestError:
    return RequestError(400, f"resume_token_ids: {problem}", param="resume_token_ids")
