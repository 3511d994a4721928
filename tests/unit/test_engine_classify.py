"""The engine gives every classified prompt the scores it gets alone, and draws no token for it."""

from dataclasses import replace

import pytest
import torch

from cluster.head.classification import Classification
from cluster.head.events import Event
from cluster.head.messages import to_sequence, to_step_events
from cluster.head.probe import pass_through_every_expert
from cluster.head.sequence import Sequence
from model import Mixtral
from model.classify import Classifier
from model.decoder import Decoder
from model.sampling_params import SamplingParams
from protos import head_pb2
from tests.cluster_fakes import BrokenRow, Head, MemoryOutbox

LABELS = ("none", "bad", "poor", "fair", "good", "best")
TOLERANCE = 1e-5
"""Of float32 logits of about 1: other batch mates, other order of sums."""


@pytest.fixture(scope="module")
def classifier(mixtral: Mixtral) -> Classifier:
    """The tiny checkpoint with a random score head."""
    hidden = mixtral.config.hidden_size
    score_CD = torch.randn(len(LABELS), hidden, generator=torch.Generator().manual_seed(0))
    weights = replace(mixtral.decoder.weights, lm_head_VD=score_CD * hidden**-0.5)
    decoder = Decoder(replace(mixtral.config, labels=LABELS), weights)
    return Classifier(decoder, mixtral.experts, tokenizer=mixtral.tokenizer)


@pytest.fixture(scope="module")
def prompts(mixtral: Mixtral, stories: list[str]) -> list[list[int]]:
    """Beginnings of stories, of very different lengths."""
    lengths = [3, 40, 1, 17, 9, 65]
    ids = [mixtral.tokenizer.encode_prompt(story) for story in stories[: len(lengths)]]
    return [story_ids[:length] for story_ids, length in zip(ids, lengths, strict=True)]


def scores_of(outbox: MemoryOutbox, key: int) -> torch.Tensor:
    """The scores of a request, which are all that was said of it."""
    (event,) = outbox.of(key)
    assert (event.error, event.token_ids, event.finish) == (None, (), "stop")
    return torch.tensor(event.scores)


@pytest.mark.parametrize("max_tokens_per_step", [6, 200], ids=["chunked", "whole prompts"])
def test_prompts_that_join_and_leave_get_the_scores_they_get_alone(
    classifier: Classifier, prompts: list[list[int]], max_tokens_per_step: int
) -> None:
    head = Head(classifier, max_tokens_per_step=max_tokens_per_step, max_running=4)
    outbox = MemoryOutbox()
    for key, prompt in enumerate(prompts):
        head.engine.submit(outbox, key, Classification(prompt))
    with head.running():
        outbox.wait_for_end(*range(len(prompts)))
    for key, prompt in enumerate(prompts):
        (alone_C,) = classifier.classify([prompt]).logits_SC
        assert (scores_of(outbox, key) - alone_C).abs().max() <= TOLERANCE
    steps = head.metrics.steps
    num_known = sum(step.num_tokens + step.num_reused for step in steps)
    assert num_known == sum(len(prompt) for prompt in prompts)
    assert sum(step.num_emitted for step in steps) == 0
    head.assert_all_free()


def test_a_prompt_may_fill_the_whole_context_and_no_more(classifier: Classifier) -> None:
    head, outbox = Head(classifier, num_blocks=32), MemoryOutbox()
    for key, length in enumerate((128, 129)):
        head.engine.submit(outbox, key, Classification([5] * length))
    with head.running():
        outbox.wait_for_end(0, 1)
    assert scores_of(outbox, 0).shape == (len(LABELS),)
    (refusal,) = outbox.of(1)
    assert refusal.is_refusal
    assert "129 prompt tokens and 0 new ones exceed the context of 128" in str(refusal.error)


def test_each_kind_of_head_refuses_the_other_kind_of_request(
    mixtral: Mixtral, classifier: Classifier
) -> None:
    generation = Sequence([1, 5], SamplingParams(max_tokens=2))
    for model, wrong, reason in (
        (classifier, generation, "use /classify"),
        (mixtral, Classification([1, 5]), "no score head"),
    ):
        head, outbox = Head(model), MemoryOutbox()
        head.engine.submit(outbox, 1, wrong)
        with head.running():
            outbox.wait_for_end(1)
        (refusal,) = outbox.of(1)
        assert refusal.is_refusal
        assert reason in str(refusal.error)
        assert head.metrics.steps == []


def test_broken_scores_cost_only_their_own_sequence(
    classifier: Classifier, prompts: list[list[int]]
) -> None:
    # a prompt of one token goes first, so that the second is the last row
    decoder = BrokenRow(classifier.decoder, step=1, row=2, value=float("nan"))
    head, outbox = Head(classifier, decoder=decoder, max_tokens_per_step=100), MemoryOutbox()
    for key in range(3):
        head.engine.submit(outbox, key, Classification(prompts[key]))
    with head.running():
        outbox.wait_for_end(0, 1, 2)
    assert "not finite" in str(outbox.of(1)[0].error)
    for key in (0, 2):
        (alone_C,) = classifier.classify([prompts[key]]).logits_SC
        assert (scores_of(outbox, key) - alone_C).abs().max() <= TOLERANCE
    head.assert_all_free()


def test_the_probe_of_a_classifier_goes_through_every_expert(classifier: Classifier) -> None:
    asked: set[tuple[int, int]] = set()

    class Watched:
        def dispatch(self, layer, x_TD, routing):  # type: ignore[no-untyped-def]
            asked.update((layer, int(e)) for e in routing.expert_ids_TK.unique())
            return classifier.experts.dispatch(layer, x_TD, routing)

    pass_through_every_expert(classifier.decoder, Watched())
    assert asked == {(unit.layer, unit.expert_id) for unit in classifier.config.expert_units}


def test_the_contract_carries_the_task_down_and_the_scores_up() -> None:
    asked = head_pb2.Submit(token_ids=[1, 5], classify=head_pb2.Classify())
    sequence = to_sequence(head_pb2.Submit.FromString(asked.SerializeToString()))
    assert isinstance(sequence, Classification)
    assert sequence.token_ids == [1, 5]
    (sent,) = to_step_events([Event(7, scores=(0.5, -2.0), finish="stop")]).events
    news = head_pb2.SequenceEvent.FromString(sent.SerializeToString())
    assert list(news.scores) == [0.5, -2.0]
    assert (news.request_id, news.finish, list(news.token_ids)) == (7, head_pb2.FINISH_STOP, [])
