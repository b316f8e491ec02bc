"""Forecast what a fleet makes a day and costs, from the predictions in benchmarks/results/; nothing is run.

    python -m fleet.forecast
    python -m fleet.forecast --preemptions_per_hour 0.2 --seed 1

All of it is for CogVideoX1.5-5B at 768 x 1360 x 81. What is neither predicted nor measured is an option, and printed as
an assumption. docs/fleet.md says how to read the tables.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.reports import LARGE, MODEL
from benchmarks.write_figures import CHIP_HOUR, result, size_text, step
from cogvideox.cli import terminal
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.cli.types import number
from cogvideox.files import writing
from cogvideox.files.state import SHARE
from compile_for_tpu import report
from fleet.simulation import Outcome, Times, simulate
from fleet.work import Work

SLICES = {"v6e-1": 1, "v6e-4": 4, "v6e-8": 8}  # their chips; each is one host
STEPS = {"draft": 10, "authors": 50, "cached": 50}  # of each setting, all with guidance
DAY, VIDEOS = 24 * 3600, (10_000, 1_000_000)
FILE = "fleet-forecast.json"

# What is assumed: default, what it is, and where the default comes from.
ASSUMPTIONS = {
    "skipped_steps": (22, "steps that the cached setting skips: TeaCache's factor 1.8, docs/performance.md"),
    "skipped_step": (0.0075, "a skipped step in full ones: 0.007 of 0.934 s on v6e-8, docs/performance.md"),
    "encode_seconds": (3.0, "to encode the mp4: 2.1 to 3.3 s were measured on two busy cores"),
    "fleet_seconds": (0.2, "that the fleet adds to a video: 0.17 s were measured with the tiny model on a CPU"),
    "keep_seconds": (0.5, "to write a state, 34 MB, to a mounted bucket: guessed"),
    "load_seconds": (30.0, "to start and load the weights of stages 2 and 3: guessed, docs/tpu-vm.md"),
    "reload_seconds": (10.0, "a group, to load weights again where stage 3 does not fit beside stage 2: guessed"),
    "compile_share": (0.13, "of the reports' seconds of compilation, from a common cache: 2 of 15 s; 1 without one"),
    "replace_seconds": (600.0, "from the loss of a host to a new one with packages and weights: guessed"),
    "prompt_seconds": (2.0, "of stage 1 a prompt: measured by others, docs/tpu-vm.md"),
    "videos_a_group": (8, "that a process makes in one go: the fleet's default"),
    "fleets": (50, "that share a million videos, each with its part of the prompts and a folder of its own"),
}
WRITES, STATE_WRITES, READS = 60, 6, 60  # requests a video and a kept state: counted with strace on the tiny model
FILES, STATE = 7.4e6 + 11.0e6 + 0.5e6, 34e6  # bytes: embeddings, latents and a video of little detail; a state

Rows = list[list[str]]


def times_of(topology: str, setting: str, given: argparse.Namespace) -> Times:
    """Return the seconds of a host with this slice."""
    of_step = step(topology, LARGE, guided=True)
    of_decode = result(report.file_name("stage3", topology, ["x".join(map(str, LARGE))]))
    skipped = given.skipped_steps * (1 - given.skipped_step) if setting == "cached" else 0
    fits = of_step["memory"]["arguments"] + of_decode["memory"]["peak"] <= of_step["memory"]["limit"]
    compilation = of_step["compile_seconds"] + of_decode["compile_seconds"]
    return Times(
        start=given.load_seconds + given.compile_share * compilation,
        group=0 if fits else given.reload_seconds,
        denoise=(STEPS[setting] - skipped) * of_step["predicted_seconds"] * (1 + SHARE),
        decode=of_decode["predicted_seconds"] + given.encode_seconds + given.fleet_seconds,
        between=max(given.keep_seconds / SHARE, of_step["predicted_seconds"]),
    )


def video_seconds(times: Times, group: int) -> float:
    """Return the seconds of a video on a host, with its part of what its group takes."""
    return times.of_videos(1) + times.group / group


def run_seconds(videos: int, hosts: int, times: Times, group: int) -> float:
    """Return the seconds of a run if no host is lost, as if the videos could be divided evenly."""
    return times.start + videos / hosts * video_seconds(times, group)


def hosts_for(videos: int, times: Times, group: int) -> int:
    """Return how many hosts make so many videos in a day if none is lost."""
    return math.ceil(videos * video_seconds(times, group) / (DAY - times.start))


def simulated(videos: int, hosts: int, times: Times, rate: float, given: argparse.Namespace) -> Outcome:
    """Simulate a run in which each host is lost so often an hour."""
    work = Work(range(1, videos + 1), (), group=given.videos_a_group)
    encoders = math.ceil(1.25 * hosts * given.prompt_seconds / video_seconds(times, given.videos_a_group))
    losses = {"life": 3600 / rate if rate else math.inf, "replace": given.replace_seconds, "seed": given.seed}
    return simulate(work, hosts, times, **losses, encoders=encoders, encode=given.prompt_seconds)


def hosts_with_losses(videos: int, times: Times, rate: float, given: argparse.Namespace) -> int:
    """Return how many hosts make so many videos in a day by simulation."""
    hosts = hosts_for(videos, times, given.videos_a_group)
    while (seconds := simulated(videos, hosts, times, rate, given).seconds) > DAY:
        hosts = max(hosts + 1, int(hosts * seconds / DAY))
    return hosts


# --- The tables, the heading first -------------------------------------------------------------------------------


def assumptions(given: argparse.Namespace) -> Rows:
    """Return what is assumed."""
    rows = [[f"`--{name}`", f"{getattr(given, name):g}", about] for name, (_, about) in ASSUMPTIONS.items()]
    return [["option", "value", "what it is"], *rows]


def all_settings(given: argparse.Namespace) -> Iterator[tuple[str, str, Times]]:
    """Yield each slice and setting with its times."""
    yield from ((topology, setting, times_of(topology, setting, given)) for topology in SLICES for setting in STEPS)


def settings(given: argparse.Namespace) -> Rows:
    """Return what one host makes whose process lives for a day."""
    rows = [["slice", "setting", "start", "a video", "videos an hour", "chip-hours a video", "$ a video, on demand"]]
    for topology, setting, times in all_settings(given):
        each = video_seconds(times, given.videos_a_group)
        hourly = 3600 / each * (1 - times.start / DAY)
        chip_hours = SLICES[topology] / hourly
        shown = [f"{times.start:,.0f} s", f"{each:.1f} s", f"{hourly:.1f}", f"{chip_hours:.3f}"]
        rows.append([topology, setting, *shown, f"{chip_hours * CHIP_HOUR:.2f}"])
    return rows


def hosts(given: argparse.Namespace) -> Rows:
    """Return the hosts that a day's videos take: by arithmetic if none is lost, else by simulation."""
    rates = [f"{rate:g} lost an hour" for rate in given.preemptions_per_hour]
    rows = [["slice", "setting", *(f"{n:,}: {rate}" for n in VIDEOS for rate in ("none lost", *rates))]]
    for topology, setting, times in all_settings(given):
        cells = []
        for fleets, videos in zip((1, given.fleets), VIDEOS, strict=True):
            part = math.ceil(videos / fleets)
            counts = [hosts_for(part, times, given.videos_a_group)]
            counts += [hosts_with_losses(part, times, rate, given) for rate in given.preemptions_per_hour]
            cells += [f"{fleets * count:,}" for count in counts]
        rows.append([topology, setting, *cells])
    return rows


def losses(given: argparse.Namespace) -> Rows:
    """Return what losses do to 10,000 videos with the authors' settings, on the hosts that are enough without."""
    rows = [["slice", "hosts", "lost an hour", "videos made", "hours", "groups lost", "redone", "efficiency"]]
    for topology in SLICES:
        times = times_of(topology, "authors", given)
        count = hosts_for(VIDEOS[0], times, given.videos_a_group)
        counted = run_seconds(VIDEOS[0], count, times, given.videos_a_group)
        rows.append(
            [topology, f"{count}", "none, by arithmetic", f"{VIDEOS[0]:,}", f"{counted / 3600:.2f}", "0", "0 s", "1"]
        )
        for rate in (0, *given.preemptions_per_hour):
            found = simulated(VIDEOS[0], count, times, rate, given)
            shown = [f"{found.seconds / 3600:.2f}", f"{found.lost}", f"{found.redone:,.0f} s"]
            efficiency = f"{counted / found.seconds:.3f}"
            rows.append([topology, f"{count}", f"{rate:g}", f"{found.made:,}", *shown, efficiency])
    return rows


def limits(given: argparse.Namespace) -> Rows:
    """Return what a day with the authors' settings asks of what all hosts share, from the least slice to the largest.

    What comes nearest to its limit, or goes farthest beyond it, is first.
    """
    every = [times_of(topology, "authors", given) for topology in SLICES]
    states = [times.denoise / times.between for times in every]
    writes = [WRITES + STATE_WRITES * number for number in states]
    written = [(FILES + STATE * number) / 1e6 for number in states]

    def a_second(*of_video: float) -> Callable[[int], list[float]]:
        return lambda videos: [videos * one / DAY for one in of_video]

    # What it is, its limit if it has one, what so many videos a day ask of it, how that is written, and the way out.
    wanted: list[tuple[str, int, Callable[[int], list[float]], str, str]] = [
        ("writes of fleet_report.jsonl a second", 1, a_second(1), ",.2f", "several folders"),
        (
            "hosts of a Ray cluster",
            2000,
            lambda videos: [hosts_for(videos, times, given.videos_a_group) for times in every],
            ",.0f",
            "several clusters, larger slices",
        ),
        ("calls of Ray a second", 500, a_second(1 / given.videos_a_group), ",.2f", "larger groups"),
        (
            "writes to the bucket a second",
            1000,
            a_second(*writes),
            ",.0f",
            "begin slowly, several buckets, fewer states",
        ),
        ("reads of the bucket a second", 5000, a_second(READS), ",.0f", "begin slowly, several buckets"),
        ("MB to the bucket a second", 0, a_second(*written), ",.0f", "fewer states"),
        ("GB in the bucket after a day", 0, lambda videos: [videos * FILES / 1e9], ",.0f", "remove all but the videos"),
        ("processes of stage 1, each with 22 GB", 0, a_second(given.prompt_seconds), ",.1f", "more of them"),
    ]
    wanted.sort(key=lambda one: -max(one[2](VIDEOS[-1])) / one[1] if one[1] else 0)
    rows = [["what", "limit", *(f"{videos:,} a day" for videos in VIDEOS), "beyond it"]]
    for what, limit, of_day, form, then in wanted:
        cells = [" to ".join(dict.fromkeys(format(f(of_day(videos)), form) for f in (min, max))) for videos in VIDEOS]
        rows.append([what, f"{limit:,}" if limit else "-", *cells, then])
    return rows


TABLES = {"assumptions": assumptions, "settings": settings, "hosts": hosts, "losses": losses, "limits": limits}


# --- The command -------------------------------------------------------------------------------------------------


def rule_microseconds(given: argparse.Namespace) -> float:
    """Return the microseconds that the rules and the simulation take here for an event of 400 hosts."""
    start = time.perf_counter()
    found = simulated(20_000, 400, times_of("v6e-8", "authors", given), 0.06, given)
    return (time.perf_counter() - start) / found.events * 1e6


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description="Forecast what a fleet makes a day and costs.")
    for name, (default, about) in ASSUMPTIONS.items():
        least = 1 if isinstance(default, int) else 0.0
        parser.add_argument(f"--{name}", type=number(type(default), least), default=default, help=about)
    parser.add_argument(
        "--preemptions_per_hour",
        type=number(float, 0, 4),
        nargs="+",
        default=[0.06, 0.6],
        help="how often an hour a host is lost: 0.06 was seen on spot TPUs of v2 and v3, docs/fleet.md",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the losses")
    report.add_publish_option(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, and with --publish write them to benchmarks/results/."""
    given = parse_arguments(argv)
    found = {name: make(given) for name, make in TABLES.items()}
    print(f"{MODEL}, {size_text(LARGE)}, a host for each slice. {report.trust()}")
    for name, rows in found.items():
        print(f"\n{name}", *terminal.table(rows), sep="\n")
    print(f"\nAn event took the rules and the simulation {rule_microseconds(given):.0f} microseconds on this machine.")
    if given.publish:
        with writing.replacing(report.RESULTS / FILE) as temporary:
            Path(temporary).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
