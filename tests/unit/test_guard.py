"""What a server counts of peers that gRPC itself turns away."""

from collections import Counter

from cluster.guard import Guard, _Handshakes
from cluster.security import Security


def test_a_handshake_after_which_nobody_calls_is_counted_as_refused() -> None:
    now = [0.0]
    refusals: Counter[str] = Counter()
    guard = Guard(Security(), lambda reason: refusals.update([reason]), clock=lambda: now[0])
    guard.begin_handshake()
    guard.begin_handshake()
    now[0] = _Handshakes.GRACE_S
    guard.begin_handshake()  # the first two may still come to something
    assert not refusals
    now[0] += 1
    guard.begin_handshake()
    assert refusals == {"handshake": 2}
    now[0] += 1
    guard.begin_handshake()
    assert refusals == {"handshake": 2}  # each once


def test_every_new_peer_accounts_for_one_handshake() -> None:
    now = [0.0]
    handshakes = _Handshakes(lambda: now[0])
    for number in range(2 * _Handshakes.MAX_PEERS):
        assert handshakes.begin() == 0
        for _ in range(3):  # its hello, its stream, its metrics
            handshakes.succeed(f"ipv4:127.0.0.1:{number}")
    assert handshakes.begin() == 0
    now[0] = 1_000.0
    assert handshakes.begin() == 1
