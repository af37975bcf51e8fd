"""rngd's health tests and quota: what they find, and how seldom they are wrong."""

from fractions import Fraction
from itertools import pairwise
from math import comb

import pytest

from nexus.abi import Nanos, ServiceId
from nexus.services.rngd.health import (
    ALPHA_BITS,
    DIGESTS_MAX,
    ENTROPY_BITS,
    MATCH_SIZE,
    PROPORTION_CUTOFF,
    PROPORTION_WINDOW,
    REPETITION_CUTOFF,
    START_SIZE,
    Failure,
    Health,
)
from nexus.services.rngd.quota import Quota
from tests.fakes.source import good

WINDOW = Nanos(1_000)
A, B, C = ServiceId(1), ServiceId(2), ServiceId(3)


def failure(*deliveries: bytes) -> Failure | None:
    """The first failure in a row of deliveries to a new source."""
    health = Health()
    for delivery in deliveries:
        found = health.failure_of(bytearray(delivery))
        if found is not None:
            return found
    return None


def test_good_bytes_pass() -> None:
    assert failure(*(good(number, 256) for number in range(400))) is None


@pytest.mark.parametrize("byte", [0x00, 0xA5, 0xFF])
def test_a_constant_source_fails_by_repetition(byte: int) -> None:
    assert failure(bytes([byte]) * 256) is Failure.REPETITION


def test_repetition_is_found_at_its_cutoff_and_not_before() -> None:
    head = good(1, 100)
    other = bytes([head[-1] ^ 1])

    assert failure(head + other * (REPETITION_CUTOFF - 1) + head) is None
    assert failure(head + other * REPETITION_CUTOFF) is Failure.REPETITION


def test_a_run_over_the_border_of_two_deliveries_is_found() -> None:
    first, second = good(1, 64), good(2, 64)
    run = bytes([first[-4]]) * 3

    assert failure(first[:-3] + run, run + second) is Failure.REPETITION


@pytest.mark.parametrize(
    "delivery",
    [bytes([0, 1]) * 128, bytes(range(4)) * 64, bytes(each % 16 for each in good(5, 512))],
    ids=["alternating", "four values", "four random bits"],
)
def test_a_small_alphabet_fails_by_proportion(delivery: bytes) -> None:
    assert failure(delivery, delivery[::-1]) is Failure.PROPORTION


def test_a_biased_source_fails_within_a_start_up_test() -> None:
    biased = bytes(
        0 if chance < 64 else value
        for chance, value in zip(good(6, START_SIZE), good(7, START_SIZE), strict=True)
    )
    first = biased.index(0)

    assert failure(biased[first:]) in (Failure.PROPORTION, Failure.REPETITION)


def test_proportion_is_found_at_its_cutoff_and_not_in_another_window() -> None:
    counted = 0
    plain = bytes(each or 1 for each in good(8, PROPORTION_WINDOW))
    window = bytearray(plain)
    for place in range(0, 2 * (PROPORTION_CUTOFF - 1), 2):
        window[place] = counted
    assert window.count(counted) == PROPORTION_CUTOFF - 1

    assert failure(bytes(window), bytes(each or 2 for each in good(9, 256))) is None
    window[-1] = counted
    assert failure(bytes(window)) is Failure.PROPORTION


def test_a_delivery_that_comes_again_fails_although_its_bytes_are_good() -> None:
    assert failure(good(1, 256), good(2, 256), good(1, 256)) is Failure.REPEATED
    assert failure(good(1, 256), good(1, MATCH_SIZE)) is Failure.REPEATED


def test_a_circle_is_found_up_to_the_length_that_is_remembered() -> None:
    circle = [good(number, 256) for number in range(DIGESTS_MAX)]

    assert failure(*circle, circle[0]) is Failure.REPEATED
    assert failure(*circle, good(DIGESTS_MAX, 256), circle[0]) is None


def test_a_fresh_start_forgets_runs_and_not_deliveries() -> None:
    health = Health()
    assert health.failure_of(bytearray(good(1, 256))) is None
    assert health.failure_of(bytearray(256)) is Failure.REPETITION
    health.restart()

    assert health.failure_of(bytearray(good(2, 256))) is None
    assert health.failure_of(bytearray(good(1, 256))) is Failure.REPEATED


def test_the_cutoffs_are_those_of_the_standard() -> None:
    alpha = Fraction(1, 2**ALPHA_BITS)
    share = Fraction(1, 2**ENTROPY_BITS)

    # 4.4.1: the chance of C - 1 further equal samples is at most alpha.
    assert share ** (REPETITION_CUTOFF - 1) <= alpha < share ** (REPETITION_CUTOFF - 2)
    # 4.4.2: CRITBINOM(W, p, 1 - alpha) is the least k with P(X <= k) >= 1 - alpha.
    tails = [Fraction(1)]
    for count in range(PROPORTION_CUTOFF + 1):
        chance = comb(PROPORTION_WINDOW, count) * share**count
        tails.append(tails[-1] - chance * (1 - share) ** (PROPORTION_WINDOW - count))
    assert all(one > other for one, other in pairwise(tails))
    critical = next(k for k, tail in enumerate(tails[1:]) if tail <= alpha)
    assert 1 + critical == PROPORTION_CUTOFF


def test_a_false_alarm_takes_years_at_full_rate() -> None:
    rate = 64 * 256  # bytes a second of one client
    seconds = 2**ALPHA_BITS // rate

    assert seconds > 2 * 365 * 86_400


# ---------------------------------------------------------------- quota


def test_a_client_has_its_bytes_and_no_more_in_a_window() -> None:
    quota = Quota(WINDOW, 100, 4)

    assert quota.charge(A, 60, Nanos(0))
    assert not quota.charge(A, 41, Nanos(10))
    assert quota.charge(A, 40, Nanos(20)), "a refused charge takes nothing"
    assert not quota.charge(A, 1, Nanos(999))
    assert quota.charge(A, 100, Nanos(1_000))


def test_a_window_begins_with_the_first_charge_in_it() -> None:
    quota = Quota(WINDOW, 100, 4)
    assert quota.charge(A, 100, Nanos(900))

    assert not quota.charge(A, 1, Nanos(1_899))
    assert quota.charge(A, 1, Nanos(1_900))


def test_what_one_client_draws_is_not_taken_from_another() -> None:
    quota = Quota(WINDOW, 100, 4)
    assert quota.charge(A, 100, Nanos(0))

    assert quota.charge(B, 100, Nanos(0))
    assert not quota.charge(A, 1, Nanos(0))


def test_the_least_recently_seen_client_is_forgotten_also_after_a_refusal() -> None:
    quota = Quota(WINDOW, 100, 2)
    assert quota.charge(A, 100, Nanos(0))
    assert quota.charge(B, 100, Nanos(0))
    assert not quota.charge(A, 1, Nanos(1)), "seen again"

    assert quota.charge(C, 100, Nanos(2))

    assert len(quota) == 2
    assert not quota.charge(A, 1, Nanos(3))
    assert quota.charge(B, 1, Nanos(3)), "forgotten"
