"""The forecast of a fleet: its arithmetic by hand, its simulation beside the arithmetic, its tables on the page."""

import itertools
import math
import random

import pytest

from benchmarks.write_figures import result
from fleet import forecast, simulation
from fleet.simulation import Times, simulate
from fleet.work import Work
from tests.helpers import ROOT
from tests.in_process import run_here

TIMES = Times(start=100, group=4, denoise=50, decode=5, between=20)  # of a host with round figures


@pytest.fixture(scope="module")
def given():
    return forecast.parse_arguments([])


def recorded(work: Work) -> list[int]:
    """Return a list to which the work adds each prompt whenever it is made."""
    made: list[int] = []
    finished = work.finished

    def note(share):
        made.extend(share.prompts)
        finished(share)

    work.finished = note
    return made


def test_arithmetic_by_hand(given, monkeypatch):
    """The authors' settings on v6e-8, in the figures of the reports, and the cached ones with fewer steps."""
    step, decode = result("stage2-v6e-8-768x1360x81-guided.json"), result("stage3-v6e-8-768x1360x81.json")
    times = forecast.times_of("v6e-8", "authors", given)
    assert times.start == pytest.approx(30 + 0.13 * (step["compile_seconds"] + decode["compile_seconds"]))
    assert times.group == 0  # stage 3 fits beside the weights
    assert times.denoise == pytest.approx(50 * 1.02 * step["predicted_seconds"])
    assert times.decode == pytest.approx(decode["predicted_seconds"] + 3.2)
    cached = forecast.times_of("v6e-8", "cached", given)
    assert cached.denoise == pytest.approx((28 + 22 * 0.0075) * 1.02 * step["predicted_seconds"])
    large = decode | {"memory": decode["memory"] | {"peak": step["memory"]["limit"] - 1}}
    monkeypatch.setattr(forecast, "result", lambda name: large)
    assert forecast.times_of("v6e-8", "draft", given).group == 10  # stage 3 does not fit beside them


def test_hosts_by_hand():
    assert forecast.video_seconds(TIMES, 8) == 55.5
    assert forecast.run_seconds(160, 2, TIMES, 8) == 100 + 80 * 55.5
    assert forecast.hosts_for(1554, TIMES, 8) == 1  # 86300 / 55.5 is 1554.95
    assert forecast.hosts_for(1555, TIMES, 8) == 2


@pytest.mark.parametrize(
    ("done", "kept"),
    [(0, 0), (19, 0), (41, 40), (50, 50), (69, 50), (71, 70), (100, 100), (104, 100), (106, 105), (110, 110)],
)
def test_what_is_kept_of_two_videos(done, kept):
    """States of the video that is denoised, all that are denoised, and all that are decoded."""
    assert TIMES.kept(2, done) == kept


@pytest.mark.parametrize(("videos", "hosts"), [(1, 1), (64, 8), (1000, 8), (999, 7), (3, 8)])
def test_the_simulation_without_losses_is_the_arithmetic(videos, hosts):
    """But for groups that are not full, and for hosts that have a video less than others at the end."""
    work = Work(range(videos), ())
    outcome = simulate(work, hosts, TIMES, encode=0.01)
    assert outcome.made == videos and outcome.lost == outcome.redone == 0
    evenly = forecast.run_seconds(videos, hosts, TIMES, group=8)
    assert evenly - 1e-6 <= outcome.seconds <= evenly + 55 + 8 * TIMES.group
    assert simulate(Work((), range(16)), 1, TIMES).seconds == forecast.run_seconds(16, 1, TIMES, group=8)


def test_a_lost_host_by_hand(monkeypatch):
    """The second of two videos was denoised for 33 seconds of which 20 are kept; the next host does the rest."""
    of_place = [(100.0, 100.0 + 4 + 50 + 33), (900.0, math.inf)]
    monkeypatch.setattr(simulation, "lives", lambda *_: iter(of_place))
    outcome = simulate(Work((), [1, 2], group=2), 1, TIMES)
    assert (outcome.made, outcome.lost, outcome.redone) == (2, 1, 13)
    assert outcome.seconds == 900 + 4 + 2 * 55 - 70


def test_lives():
    """A host is ready after its start, if it lives so long, and the next one comes some time after it."""
    found = [*itertools.islice(simulation.lives(TIMES, 50, 600, random.Random(0)), 300)]
    assert all(end > ready for ready, end in found)
    assert all(ready >= end + 700 for (_, end), (ready, _) in itertools.pairwise(found))
    assert sum(end - ready for ready, end in found) / 300 == pytest.approx(50, rel=0.2)
    assert next(simulation.lives(TIMES, math.inf, 600, random.Random(0))) == (100, math.inf)


@pytest.mark.parametrize("life", [300, 3600])
def test_losses_lose_no_video(life):
    """Even of hosts that live for five minutes: all videos are made, none twice, and the same seed says the same."""
    outcomes = []
    for _ in range(2):
        work = Work(range(500), ())
        made = recorded(work)
        outcomes.append(simulate(work, 5, TIMES, life=life, replace=60, seed=3, encode=0.1))
        assert sorted(made) == [*range(500)] and work.made == {*made} and not work.failed
    assert outcomes[0] == outcomes[1]
    without = simulate(Work(range(500), ()), 5, TIMES, encode=0.1)
    assert outcomes[0].lost > 5 and outcomes[0].redone > 0
    assert outcomes[0].seconds > without.seconds


def test_hosts_with_losses_are_enough(given):
    times = forecast.times_of("v6e-4", "authors", given)
    count = forecast.hosts_with_losses(5000, times, 1.0, given)
    assert count > forecast.hosts_for(5000, times, given.videos_a_group)
    assert forecast.simulated(5000, count, times, 1.0, given).seconds <= forecast.DAY


@pytest.mark.parametrize("name", [name for name in forecast.TABLES if name != "hosts"])  # which takes longer
def test_published_tables_are_what_the_command_prints(name, given):
    assert result(forecast.FILE)[name] == forecast.TABLES[name](given), "run: python -m fleet.forecast --publish"


def test_the_command(monkeypatch):
    """Its options reach the tables; a rate that is none is an error of one line."""
    monkeypatch.setattr(forecast, "TABLES", {name: forecast.TABLES[name] for name in ("assumptions", "settings")})
    printed = run_here("fleet.forecast", "--encode_seconds", "7", "--fleets", "2", folder=ROOT)
    assert printed.returncode == 0 and "--encode_seconds`   7 " in printed.stdout and "v6e-8" in printed.stdout
    wrong = run_here("fleet.forecast", "--preemptions_per_hour", "-1", folder=ROOT)
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1
