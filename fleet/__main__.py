"""Make the videos of a prompt file on all machines of a Ray cluster, or on this one: `python -m fleet`."""

import contextlib
import importlib.util
import sys
from collections.abc import Sequence

from cogvideox import packages
from cogvideox.cli.program import run
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, videos, writing
from cogvideox.files.names import ROOT, VIDEO
from cogvideox.files.prompts import Prompt, read_prompts
from fleet import found
from fleet.options import Command, parse
from fleet.report import Report
from fleet.work import Work

FAILED, MOST = 10, 100  # the exit status is the first and the number of prompts that failed, at most the second


def main(argv: Sequence[str] | None = None) -> None:
    """Run the fleet with these options, by default those of the command line."""
    command = parse(argv)
    options, folder = command.options, command.options.output_dir.absolute()
    if importlib.util.find_spec("ray") is None:
        raise UserError(packages.missing("ray", ROOT / "fleet" / "requirements.txt"))
    prompts = read_prompts(options.prompt_file, folder, options.image and options.image.absolute())
    if not any(prompt.image for prompt in prompts):
        command = parse(argv, has_images=False)
    videos.check_prompts(folder, [prompt.folder for prompt in prompts])
    with writing.claimed(folder, "fleet"):
        model_id = checkpoint.resolve_model_id(options.model_id)
        checkpoint.read_config(model_id, "transformer")  # says what is wrong with the model's name
        states = found.states(prompts, command, model_id)
        work = work_of(states, command)
        with Report(folder, prompts, options.quiet) as report:
            try:
                if not work.is_over:
                    make(work, prompts, command, report)
            except BaseException:
                with contextlib.suppress(UserError):  # why it ends is what counts
                    videos.record(folder, found.entries(prompts), anew=True)
                raise
            videos.record(folder, found.entries(prompts), anew=True)
            report.table(work.made, work.failed)
    if work.failed:
        sys.exit(FAILED + min(len(work.failed), MOST))


def work_of(states: Sequence[found.State], command: Command) -> Work:
    """Return what is to be done for prompts that are so far."""
    options = command.options
    of_state = {state: [n for n, one in enumerate(states, 1) if one == state] for state in found.State}
    work = Work(
        of_state[found.State.NOTHING],
        of_state[found.State.ENCODED],
        chunk=options.group,
        group=options.group,
        at_once=options.videos_at_once or 1,
    )
    work.made.update(of_state[found.State.MADE])
    return work


def make(work: Work, prompts: Sequence[Prompt], command: Command, report: Report) -> None:
    """Do the work on the machines of a cluster."""
    from fleet.cluster import joined
    from fleet.conductor import Conductor

    options = command.options
    report.say(f"Fleet: {len(prompts)} prompts, {len(work.made)} of them made before, with {options.model_id}")
    again = [one for n, one in enumerate(prompts, 1) if n not in work.made and any(one.folder.rglob(VIDEO))]
    if again:
        report.say(f"  {len(again)} others have videos of other options, weights or inputs, which are replaced")
    report.say(f"  {'joining' if options.address else 'starting'} Ray")
    with joined(options.address) as dashboard:
        if dashboard:
            report.say(f"  Ray's dashboard: http://{dashboard}")
        Conductor(work, prompts, command, found.encoder_bytes(options), report).run()


if __name__ == "__main__":
    run(main)
