"""Run the rules of fleet/work.py against a clock of their own, on hosts that are lost at random and replaced."""

import dataclasses
import heapq
import itertools
import math
import random
from collections.abc import Iterator

from fleet.work import Share, Work


@dataclasses.dataclass(frozen=True)
class Times:
    """How long things take on a host, in seconds.

    Attributes:
        start: until a new process can take its first group: to load the weights and to compile.
        group: before the first step of a group.
        denoise: of stage 2, a video.
        decode: of stage 3 and all that follows it, a video.
        between: of denoising between two states that are kept.
    """

    start: float
    group: float
    denoise: float
    decode: float
    between: float

    def of_videos(self, videos: int) -> float:
        """Return the seconds of work on so many videos: all are denoised, and then all are decoded."""
        return videos * (self.denoise + self.decode)

    def kept(self, videos: int, done: float) -> float:
        """Return how much of `done` seconds of work on so many videos is not done again when their host is lost.

        Finished videos and latents stay, and of the video that is denoised the steps up to its last state.
        """
        if done < videos * self.denoise:
            return done - done % self.denoise % self.between
        return done - (done - videos * self.denoise) % self.decode


@dataclasses.dataclass
class Outcome:
    """What became of a run.

    Attributes:
        made: the videos.
        seconds: until the last one was made.
        lost: how many groups were taken from a host that was lost.
        redone: seconds of work on videos that were done again.
        events: how often a host came, made or lost a group, or prompts were encoded.
    """

    made: int = 0
    seconds: float = 0.0
    lost: int = 0
    redone: float = 0.0
    events: int = 0


def lives(times: Times, life: float, replace: float, generator: random.Random) -> Iterator[tuple[float, float]]:
    """Yield from when to when a place has a host that can work, one host after the other."""
    begin = 0.0
    while True:
        end = begin + (generator.expovariate(1 / life) if life < math.inf else math.inf)
        if end > begin + times.start:
            yield begin + times.start, end
        begin = end + replace


def simulate(
    work: Work,
    hosts: int,
    times: Times,
    life: float = math.inf,
    replace: float = 0.0,
    seed: int = 0,
    encoders: int = 1,
    encode: float = 0.0,
) -> Outcome:
    """Run all of `work` on so many hosts, and return what became of it.

    Args:
        work: what is to be done.
        hosts: that denoise and decode, all started at time 0.
        times: of each host.
        life: mean seconds of a host until it is lost, exponentially distributed.
        replace: seconds until there is another host in its place.
        seed: of the losses.
        encoders: processes of stage 1, which are not lost.
        encode: seconds of stage 1 a prompt.
    """
    outcome, generator = Outcome(), random.Random(seed)
    places = [lives(times, life, replace, generator) for _ in range(hosts)]
    host = [next(place) for place in places]
    done: dict[tuple[int, ...], float] = {}  # seconds of work on a group that came back that need not be done again
    number = itertools.count()  # tells events of the same time apart
    events: list[tuple[float, int, int, Share | None, float]] = []  # time, number, place, its group and since when
    encoding: list[tuple[float, int, Share]] = []
    idle: list[int] = []

    def take(place: int, now: float) -> bool:
        """Give a group to the place, or let it wait for its next host; return False if there is no group."""
        while host[place][1] <= now:
            host[place] = next(places[place])
        ready, end = host[place]
        if ready > now:
            heapq.heappush(events, (ready, next(number), place, None, ready))
        elif share := work.next_to_make(hosts):
            finish = now + times.group + times.of_videos(len(share.prompts)) - done.get(share.prompts, 0.0)
            heapq.heappush(events, (min(finish, end), next(number), place, share, now))
        else:
            return False
        return True

    def encode_next(now: float) -> None:
        if share := work.next_to_encode():
            heapq.heappush(encoding, (now + encode * len(share.prompts), next(number), share))

    for _ in range(encoders):
        encode_next(0.0)
    for place in range(hosts):
        heapq.heappush(events, (host[place][0], next(number), place, None, 0.0))
    while not work.is_over:
        outcome.events += 1
        if encoding and (not events or encoding[0][0] <= events[0][0]):
            now, _, share = heapq.heappop(encoding)
            work.encoded(share)
            encode_next(now)
        else:
            now, _, place, group, since = heapq.heappop(events)
            if group and now < host[place][1]:
                work.finished(group)
                outcome.made += len(group.prompts)
                outcome.seconds = now
            elif group:
                reached = done.get(group.prompts, 0.0) + max(0.0, now - since - times.group)
                done[group.prompts] = times.kept(len(group.prompts), reached)
                outcome.redone += reached - done[group.prompts]
                outcome.lost += 1
                work.lost(group, "make")
            idle.append(place)
        idle = [place for place in idle if not take(place, now)]
    return outcome
