"""Many callers hang up at once, wherever their requests are: nothing of them stays behind."""

from cluster.client import Client
from model import Mixtral
from tests.integration.conftest import Service
from tests.integration.test_service import PROMPT, counted, until
from tests.leavers import IDLE, ask_and_leave, bodies, in_hand

NUM_CLIENTS = 24
PATIENCE_S = 0.5


def test_callers_who_hang_up_leave_nothing_behind(
    service: Service, client: Client, mixtral: Mixtral, stories: list[str]
) -> None:
    asked = bodies(stories, NUM_CLIENTS)
    emitted_before = counted(client, "maestrale_generation_tokens_total")
    left = ask_and_leave(service.url, asked, PATIENCE_S, at_once=NUM_CLIENTS)
    assert not any(each.is_over for each in left)
    reply = client.completions.create(prompt=PROMPT, max_tokens=10, temperature=0)
    assert reply.choices[0].text == mixtral.generate(PROMPT, max_tokens=10)
    until(lambda: in_hand(client) == IDLE, "all that they had asked for to be given up")
    # half are streamed, half are not: had either gone on to their ends, half would have come
    emitted = counted(client, "maestrale_generation_tokens_total") - emitted_before
    assert emitted < sum(body["max_tokens"] for body in asked) / 2
