"""The rules of a fleet: which prompts are taken together, and what becomes of those that fail or are lost."""

import pytest

from fleet.work import MOST_LOSSES, Share, Work


def taken(work: Work, places: int) -> list[int]:
    """Return the sizes of all groups that there are to make, taken one after the other."""
    sizes = []
    while share := work.next_to_make(places):
        sizes.append(len(share.prompts))
    return sizes


@pytest.mark.parametrize(
    ("prompts", "places", "group", "at_once", "sizes"),
    [
        (20, 1, 8, 1, [8, 8, 4]),
        (20, 2, 8, 1, [8, 6, 3, 2, 1]),  # smaller at the end, for both to end at about the same time
        (3, 8, 8, 1, [1, 1, 1]),
        (20, 1, 8, 3, [6, 6, 6, 2]),  # whole numbers of videos that are denoised together
        (6, 4, 8, 3, [3, 3]),  # which stay together at the end, too
        (3, 1, 8, 16, [3]),
    ],
)
def test_groups(prompts, places, group, at_once, sizes):
    assert taken(Work((), range(prompts), group=group, at_once=at_once), places) == sizes


def test_a_run():
    """Prompts are encoded in chunks, then made in groups, each once."""
    work = Work(range(1, 6), [6], chunk=3, group=4)
    assert work.waiting == 6 and not work.is_over
    first, second = work.next_to_encode(), work.next_to_encode()
    assert (first.prompts, second.prompts, work.next_to_encode()) == ((1, 2, 3), (4, 5), None)
    assert work.next_to_make(1) == Share((6,)) and work.next_to_make(1) is None
    work.encoded(second)
    work.encoded(first)
    one, two = work.next_to_make(1), work.next_to_make(1)
    assert (one.prompts, two.prompts, work.next_to_make(1)) == ((4, 5, 1, 2), (3,), None)
    for share in (one, two, Share((6,))):
        assert not work.is_over
        work.finished(share)
    assert work.is_over and work.made == {1, 2, 3, 4, 5, 6} and not work.failed and not work.under_way
    assert set(work.tries.values()) == {1}


def test_of_a_group_that_fails_each_prompt_is_tried_alone():
    """Who fails alone too has failed for good, with its last error."""
    work = Work((), range(1, 5), group=4)
    group = work.next_to_make(1)
    work.failed_with(group, "make", "out of memory")
    alone = [work.next_to_make(1) for _ in range(4)]
    assert alone == [Share((n,)) for n in range(1, 5)] and work.next_to_make(1) is None
    for n in (0, 1, 3):
        work.finished(alone[n])
    assert not work.is_over and not work.failed
    work.failed_with(alone[2], "make", "not finite")
    assert work.is_over and work.made == {1, 2, 4} and work.failed == {3: "not finite"}
    assert work.tries == {1: 2, 2: 2, 3: 2, 4: 2}


@pytest.mark.parametrize("step", ["encode", "make"])
def test_a_lost_machine_is_no_failure(step):
    """Its share comes back with the same prompts, before others, often; retries alone are lost in the same way."""
    prompts = range(1, 5)
    work = Work(prompts, (), chunk=2) if step == "encode" else Work((), prompts, group=2)
    take = work.next_to_encode if step == "encode" else lambda: work.next_to_make(1)
    share = take()
    work.put_back(share, step)
    assert take() == share == Share((1, 2))
    for losses in range(MOST_LOSSES):
        assert not share.is_to_blame
        work.lost(share, step)
        assert work.waiting == 4 and not work.under_way
        share = take()
        assert share == Share((1, 2), losses + 1)
    assert share.is_to_blame
    work.failed_with(share, step, "bad")
    alone = take()
    work.lost(alone, step)
    again = take()
    assert (alone, again) == (Share((1,)), Share((1,), 1)) and not work.failed
    work.failed_with(again, step, "bad again")
    assert work.failed == {1: "bad again"}


def test_a_prompt_that_cannot_be_encoded():
    """It alone fails, after the second time; and what was hard to encode has its two tries to be made."""
    work = Work([1, 2, 3], (), chunk=3)
    work.failed_with(work.next_to_encode(), "encode", "too long")
    shares = [work.next_to_encode() for _ in range(3)]
    assert [share.prompts for share in shares] == [(1,), (2,), (3,)]
    work.failed_with(shares[1], "encode", "prompt 2 is too long")
    work.encoded(shares[0])
    work.encoded(shares[2])
    assert work.failed == {2: "prompt 2 is too long"}
    work.failed_with(work.next_to_make(1), "make", "a crash")
    assert work.failed.keys() == {2}
    while share := work.next_to_make(1):
        work.finished(share)
    assert work.is_over and work.made == {1, 3}
