"""A worker obeys the latest controller, whatever one before it still says."""

from cluster.expert.lease import Lease


def test_each_renewal_lasts_as_long() -> None:
    lease = Lease(60.0, 100.0)
    assert lease.ends == 160.0
    lease.renew("one", (1, 0), 130.0)
    assert lease.ends == 190.0


def test_a_later_controller_takes_over_for_good() -> None:
    lease = Lease(60.0, 0.0)
    lease.renew("old", (1, 7), 1.0)
    assert lease.owner == "old"
    lease.renew("new", (2, 0), 2.0)
    assert lease.owner == "new"
    lease.renew("old", (1, 9), 3.0)
    assert lease.owner == "new"
    assert lease.ends == 63.0  # either keeps it alive


def test_a_controller_that_is_told_of_a_higher_term_takes_over_with_the_next_renewal() -> None:
    """Its clock is behind."""
    lease = Lease(60.0, 0.0)
    assert lease.renew("old", (5, 7), 1.0) == (0, 0)
    assert lease.renew("new", (2, 0), 2.0) == (5, 7)
    assert lease.owner == "old"
    assert lease.renew("new", (6, 7), 3.0) == (5, 7)
    assert lease.owner == "new"
    assert lease.renew("new", (6, 8), 4.0) == (6, 7)
    assert lease.owner == "new"
