"""Run the work of a fleet on a Ray cluster: a process for each place, the next share for each that is free."""

import collections
import dataclasses
import math
import os
import time
from collections.abc import Sequence
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cogvideox.errors import UserError
from cogvideox.files import numbers, videos
from cogvideox.files.prompts import Prompt
from cogvideox.run.hosts import sources
from cogvideox.signals import Interruption
from fleet.options import Command
from fleet.places import Node, Place, places
from fleet.report import Report
from fleet.work import Share, Work
from fleet.worker import Outcome, Process, Worker, interrupt

LOOK_SECONDS = 5.0  # after which the cluster is looked at again, and what could not begin is tried again
MOST_FAULTS = 3  # processes of a place that end before they begin; then it gets no other
ALIKE = 2  # prompts that fail with the same words before one is made: then all would, as by a wrong option
PATIENCE_SECONDS = 120.0  # that a process may take to begin before somebody is told
STOP_SECONDS = 120.0  # that processes have to end a step and keep their state
PLACES_OF_ENCODER = 16  # places for which one process encodes prompts
STEPS = {"encode": ("stage1",), "make": ("stage2", "stage3")}  # the stages of a share
PORT = 8482  # of the first process of a place of several machines

PROCESS_DIED = "worker process has died"
NO_PLACE = (
    "no machine of the cluster has chips for a video; waiting for one with a TPU or a GPU, or one that is started with "
    """ray start --resources '{"video_worker": 1}'"""
)

# How many bytes stage 1 needs for each byte of the text encoder's weights, and beside them.
ENCODER_MEMORY, ENCODER_BASE = 1.2, 2 * 2**30


@dataclasses.dataclass(eq=False)
class Hand:
    """The process, or on a slice of several hosts the processes, that run stages in one place.

    Attributes:
        place: where it makes videos; an encoder has none.
        actors: the processes, in Ray's words.
        processes: what they say of themselves; empty until they have begun.
        share: what it has to do.
        stage: that it runs now.
        answers: what its processes have answered in this stage.
        seconds: that the stages of the share took.
        warnings: that they gave.
        rests_until: the time before which it gets nothing new.
        hired: when Ray was asked for it.
    """

    place: Place | None
    actors: list[Any]
    processes: list[Process] = dataclasses.field(default_factory=list)
    share: Share | None = None
    stage: str = ""
    answers: list[Any] = dataclasses.field(default_factory=list)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    rests_until: float = 0.0
    hired: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def step(self) -> Literal["encode", "make"]:
        """What it does."""
        return "make" if self.place else "encode"

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Its machines."""
        return self.place.nodes if self.place else ()

    @property
    def name(self) -> str:
        """The name of its machine."""
        return self.nodes[0].name if self.nodes else next((one.name for one in self.processes), "the encoder's machine")


class Conductor:
    """What gives the work of a run to the processes of a cluster.

    Args:
        work: what is to be done.
        prompts: all of them, in the order of their numbers.
        command: how.
        encoder_bytes: the size of the text encoder's weights.
        report: is told.

    Attributes:
        hands: the processes.
        pending: by Ray's reference to each answer that is to come, who gives it.
        stop: why no new work is given; None as long as it is.
    """

    def __init__(self, work: Work, prompts: Sequence[Prompt], command: Command, encoder_bytes: int, report: Report):
        self.work, self.prompts, self.command, self.report = work, prompts, command, report
        self.hands: list[Hand] = []
        self.pending: dict[Any, Hand] = {}
        self.stop: str | None = None
        self._encoder_memory = int(ENCODER_BASE + ENCODER_MEMORY * encoder_bytes)
        self._seconds_of_stage1: dict[int, float] = {}
        self._looked, self._said, self._placed, self._made_before = 0.0, False, False, len(work.made)
        self._faults: collections.Counter[Place | None] = collections.Counter()  # of processes that did not begin
        self._worker, self._sources = ray.remote(Worker), sources()

    def run(self) -> None:
        """Do all of the work.

        Raises:
            UserError: it cannot go on, such as when the disk is full.
            KeyboardInterrupt: a signal came; the processes have ended.
        """
        try:
            with Interruption.raised():
                self._show(now=True)
                while not self.work.is_over and not self.stop:
                    self._look()
                    self._give()
                    self._wait()
        except KeyboardInterrupt:
            self._end_early()
            made, total = len(self.work.made), len(self.prompts)
            raise KeyboardInterrupt(
                f"interrupted; {made} of {total} prompts are made, the same command goes on"
            ) from None
        if self.stop:
            self._end_early()
            raise UserError(self.stop)
        self._show()

    # --- Who is there --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Hire a process for each place that has none, now and then."""
        if time.monotonic() - self._looked < LOOK_SECONDS and self._looked:
            return
        self._looked = time.monotonic()
        there = [*places(ray.nodes(), self.command.options.chips)]
        fit = [place for place in there if self._faults[place] < MOST_FAULTS]
        if there and not self._placed:
            self._placed = True
            names = collections.Counter(f"{place.chips:g} {place.kind}" for place in there)
            self.report.say(f"  places: {', '.join(f'{n} x {name}' for name, n in names.items())}")
        taken = {hand.place for hand in self.hands if hand.place}
        for place in [place for place in fit if place not in taken][: max(self.work.left - len(taken), 0)]:
            self._hire(place)
        encoders = sum(hand.step == "encode" for hand in self.hands)
        if self.work.is_encoding and encoders * PLACES_OF_ENCODER < max(len(there), 1):
            self._hire(None)
        if (there and not fit) or self._faults[None] >= MOST_FAULTS:
            self.stop = "no process begins on the machines of the cluster; see the warnings above"
        if not there and not self._said:
            self._said = True
            self.report.warn(NO_PLACE)
        for hand in self.hands:
            if not hand.processes and self._looked - hand.hired > PATIENCE_SECONDS:
                hand.hired = math.inf  # which is said once
                what = f"the chips of {hand.name}" if hand.place else "a CPU and memory for stage 1"
                self.report.warn(f"still waiting for {what}; `ray status` says who has them")

    def _hire(self, place: Place | None) -> None:
        """Let Ray start the processes of a place, or an encoder."""
        hand = Hand(place, [])
        for node in hand.nodes or (None,):
            options = place.actor_options | {"num_cpus": 0} if place else self._encoder_options()
            if node:
                options |= {"scheduling_strategy": NodeAffinitySchedulingStrategy(node.id, soft=False)}
            actor = self._worker.options(max_restarts=0, **options).remote(os.environ.get("OMP_NUM_THREADS"))
            hand.actors.append(actor)
        self.hands.append(hand)
        self._ask(hand, [actor.process.remote() for actor in hand.actors])

    def _encoder_options(self) -> dict[str, Any]:
        """Return the resources of a process for stage 1: a CPU and its memory, or all of a machine's if it has less."""
        most = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
        return {"num_cpus": 1, "memory": min(self._encoder_memory, int(most))}

    def _ask(self, hand: Hand, answers: Sequence[Any]) -> None:
        """Expect an answer of each process of a place."""
        hand.answers = []
        self.pending |= dict.fromkeys(answers, hand)

    def _dismiss(self, hand: Hand) -> None:
        """End the processes of a place; a new one may be hired for it."""
        self.hands.remove(hand)
        self.pending = {ref: one for ref, one in self.pending.items() if one is not hand}
        for actor in hand.actors:
            ray.kill(actor)

    # --- What they do --------------------------------------------------------------------------------------------

    def _give(self) -> None:
        """Give each process that is free the next share."""
        making = sum(hand.step == "make" for hand in self.hands)
        for hand in self.hands:
            is_free = hand.processes and hand.share is None and time.monotonic() >= hand.rests_until
            if not is_free:
                continue
            share = self.work.next_to_encode() if hand.step == "encode" else self.work.next_to_make(making)
            if share:
                hand.share, hand.seconds, hand.warnings = share, {}, []
                self._begin(hand, STEPS[hand.step][0])
        for hand in [one for one in self.hands if one.step == "encode"]:
            if not self.work.is_encoding:
                self._dismiss(hand)  # its memory is free then

    def _begin(self, hand: Hand, stage: str) -> None:
        """Let a process run a stage of its share."""
        assert hand.share
        hand.stage = stage
        module, words = self.command.modules[stage], [*self.command.words[stage]]
        words += ["--only", numbers.as_text(sorted(hand.share.prompts))]
        if len(hand.actors) > 1:
            words += ["--coordinator_address", f"{hand.nodes[0].address}:{PORT}"]
            words += ["--num_processes", str(len(hand.actors)), "--process_id"]
            answers = [actor.run_with_others.remote(module, [*words, str(n)]) for n, actor in enumerate(hand.actors)]
        else:
            answers = [hand.actors[0].run.remote(module, words)]
        self._ask(hand, answers)

    def _wait(self) -> None:
        """Wait for answers, not longer than until it is time to look again, and take them."""
        self._show()
        if not self.pending:
            time.sleep(LOOK_SECONDS / 10)
            return
        ready, _ = ray.wait([*self.pending], timeout=LOOK_SECONDS)
        for ref in ready:
            if ref in self.pending:  # else it is of somebody who is gone
                self._take(ref, self.pending.pop(ref))

    def _show(self, now: bool = False) -> None:
        """Show how far it is."""
        work, stages = self.work, {hand.stage for hand in self.hands if hand.share}
        failed, left = len(work.failed), work.left
        self.report.progress(len(self.prompts) - left - failed, left - work.waiting, failed, left, stages, now)

    def _take(self, ref: Any, hand: Hand) -> None:
        """Take an answer of a process."""
        try:
            hand.answers.append(ray.get(ref))
        except RayActorError as error:
            self._lose(hand, error)
            return
        if len(hand.answers) < len(hand.actors):
            return
        if not hand.processes:
            self._welcome(hand)
            return
        self._end_stage(hand, next((one for one in hand.answers if one.end != "made"), hand.answers[0]))

    def _welcome(self, hand: Hand) -> None:
        """Note that the processes of a place have begun, if they would run the same files as this one."""
        hand.processes = hand.answers
        for process in hand.processes:
            if process.sources != self._sources:
                self._faults[hand.place] += MOST_FAULTS
                self.report.warn(f"{process.name} has other files of this project than this machine; it gets no work")
                self._dismiss(hand)
                return

    def _end_stage(self, hand: Hand, outcome: Outcome) -> None:
        """Go on after a stage with the next one, or note what became of the share."""
        share, work = hand.share, self.work
        assert share
        hand.seconds[hand.stage] = outcome.seconds / len(share.prompts)
        hand.warnings += outcome.warnings
        following = STEPS[hand.step][STEPS[hand.step].index(hand.stage) + 1 :]
        if outcome.end == "made" and following and not self.stop:
            self._begin(hand, following[0])
            return
        hand.share = None
        if outcome.end == "made" and hand.step == "encode":
            work.encoded(share)
            self._seconds_of_stage1 |= dict.fromkeys(share.prompts, hand.seconds["stage1"])
        elif outcome.end == "made" and not following:
            work.finished(share)
            self._tell(hand, share, share.prompts)
        elif outcome.end in ("made", "busy", "interrupted", "full"):  # which is not the prompts' fault
            work.put_back(share, hand.step)
            hand.rests_until = time.monotonic() + LOOK_SECONDS
            if outcome.end == "full":
                self.stop = f"{outcome.error}; then the same command goes on"
        else:
            self._fail(hand, share, outcome.error)
            if outcome.trace:
                self.report.warn(f"on {hand.name}:\n{outcome.trace}")
        if outcome.end == "broken":
            self._dismiss(hand)  # for it may be in disorder

    def _lose(self, hand: Hand, error: RayActorError) -> None:
        """Give the share of a process that has died to another one: it is to blame unless a machine is gone."""
        share, reason = hand.share, " ".join(str(error).split())
        # Ray says what has died: the process, by the word of its machine, or the machine, of which nobody speaks.
        is_there = PROCESS_DIED in reason and not error.preempted
        self._dismiss(hand)
        if not hand.processes:
            self._faults[hand.place] += 1
            if self._faults[hand.place] == MOST_FAULTS:
                self.report.warn(f"no process begins on {hand.name}: {reason}")
        if share is None:
            return
        if is_there or share.is_to_blame:
            self._fail(hand, share, f"its process ended in {hand.stage}: {reason}")
        else:
            self.work.lost(share, hand.step)
            self.report.say(f"  {hand.name} is gone; {len(share.prompts)} prompts go to others")

    def _fail(self, hand: Hand, share: Share, error: str) -> None:
        """Note that a share has failed, and tell of the prompts for which that was the last try."""
        before, work = set(self.work.failed), self.work
        work.failed_with(share, hand.step, error)
        self._tell(hand, share, [prompt for prompt in share.prompts if prompt in work.failed.keys() - before])
        if len(work.failed) >= ALIKE and len(set(work.failed.values())) == 1 and len(work.made) == self._made_before:
            self.stop = f"each of the first {len(work.failed)} prompts fails twice, and alike: {error}"

    def _tell(self, hand: Hand, share: Share, ended: Sequence[int]) -> None:
        """Tell the report of prompts that are made or have failed for good."""
        for number in ended:
            prompt, error = self.prompts[number - 1], self.work.failed.get(number)
            first = {"stage1": self._seconds_of_stage1[number]} if number in self._seconds_of_stage1 else {}
            about: dict[str, Any] = {"tries": self.work.tries[number], "together": len(share.prompts), "error": error}
            about |= {"warnings": hand.warnings} if hand.warnings else {}
            folders = videos.videos(prompt.folder) if error is None else [prompt.folder]
            self.report.ended(folders, prompt.text, hand.name, first | hand.seconds, **about)
            if error:
                self.report.say(f"  {prompt.folder.name} failed twice: {error}")

    # --- The end -------------------------------------------------------------------------------------------------

    def _end_early(self) -> None:
        """Let all processes end in good order: stage 2 after the step in progress, with its state kept."""
        busy, self.stop = [hand for hand in self.hands if hand.share], self.stop or "interrupted"
        if not busy:
            return
        self.report.say("  stopping: steps in progress end, and their state is kept; a second signal ends at once")
        for process in (process for hand in busy for process in hand.processes):
            on_its_machine = NodeAffinitySchedulingStrategy(process.node, soft=False)
            ray.remote(interrupt).options(num_cpus=0, scheduling_strategy=on_its_machine).remote(process.number)
        until = time.monotonic() + STOP_SECONDS
        while self.work.under_way and time.monotonic() < until:
            self._wait()
