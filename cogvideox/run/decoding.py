"""Run stage 3: the weights of a decoder, and one video after the other through its programs to the encoder."""

import argparse
import collections
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cogvideox.cli import next_command
from cogvideox.cli.report import Progress, Report
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, contact_sheet, provenance, stage_files, tensors, writing
from cogvideox.files import videos as of_index
from cogvideox.files.names import SHEET
from cogvideox.files.schemas import LATENT_ENTRIES
from cogvideox.files.video_file import video_writer
from cogvideox.run import warm
from cogvideox.run.hosts import Hosts
from cogvideox.run.jobs import Video, decoding_folder
from cogvideox.run.plans import dump_recorder, dump_wanted, plan_errors
from cogvideox.signals import Interruption

SHOWN_FRAMES, SHOWN_SIZE = 4, 240  # frames of each video on a contact sheet, and their longer side in pixels at most
MOST_SHOWN = 100  # videos on a contact sheet

if TYPE_CHECKING:
    import jax

    from cogvideox.models.vae.decoder import Decoder
    from cogvideox.models.vae.encoder import Encoder
    from cogvideox.models.vae.plan import DecodingPlan
    from cogvideox.run.profiling import Profile
    from cogvideox.run.recorder import NoRecorder, Recorder


def import_modules(decoder: str) -> None:
    """Import what loading, a decoder and the encoding need, so that no other part of the run waits for it."""
    for name in (
        f"cogvideox.models.vae.vae_{decoder}",
        "cogvideox.models.shared.loading",
        "cogvideox.run.recorder",
        "imageio.plugins.ffmpeg",
        "imageio.v2",
        "PIL.Image",
    ):
        importlib.import_module(name)


def weight_files(
    half: "Decoder | Encoder",
    model_id: str,
    variant: str | None = None,
    say: Callable[[str], None] = stage_files.ignore,
    name: str = "decoder",
) -> Any:
    """Return the weights of a half of the VAE as the tree that it takes, mapped from files, not yet read.

    `variant` and `say` are those of `checkpoint.weight_files`; the `name` is "decoder" or "encoder".

    Raises:
        UserError: a file is missing or damaged, or does not have these weights.
    """
    shapes = {f"{name}.{weight}": shape for weight, shape in half.weight_shapes.items()}
    read = checkpoint.tensor_reader(model_id, "vae", shapes, variant=variant, say=say)
    return half.convert_weights({weight: read(f"{name}.{weight}") for weight in half.weight_shapes})


def values_of(files: Any) -> dict[str, int]:
    """Return how many values a tree of arrays has in each dtype; see `tensors.values_by_dtype`."""
    import jax

    return tensors.values_by_dtype(jax.tree.leaves(files))


def trace_chunks(
    arguments: argparse.Namespace, plan: "DecodingPlan", decoder: "Decoder", files: Any
) -> "list[jax.stages.Traced]":
    """Trace the programs of a decode with weights `files`.

    Raises:
        UserError: --dump_names names no module.
    """
    wanted = dump_wanted(arguments)
    with plan_errors():
        return warm.kept("chunks", (plan, wanted), lambda: plan.programs(decoder, plan.on_devices(files), wanted))


def recorder(
    arguments: argparse.Namespace,
    video: Video,
    model_id: str,
    plan: "DecodingPlan",
    traced: "Sequence[jax.stages.Traced]",
) -> "Recorder | NoRecorder":
    """Make what writes the files of --dump, which takes a single video."""
    metadata = stage_files.made_from(video.config, LATENT_ENTRIES) | made(video, model_id, plan, arguments)
    runs = [program for program, n in zip(traced, plan.runs, strict=True) for _ in range(n)]
    return dump_recorder(arguments, "stage3", "chunk", metadata, plan.split.mesh, runs)


def load_weights(files: Any, abstract: Any, report: Report | None = None, name: str = "decoder") -> Any:
    """Load the weights of a half of the VAE onto the devices.

    Args:
        files: from `weight_files`.
        abstract: a tree of the same structure with shapes, dtypes and shardings.
        report: is told what was loaded.
        name: "decoder" or "encoder".
    """
    import jax

    from cogvideox.models.shared.loading import ignore, load_arrays

    stored, tree = jax.tree.flatten(files)

    def fill(i: int, index: tuple[slice, ...], part: np.ndarray) -> None:
        part[...] = stored[i][index]

    told = report.add_part if report else ignore
    leaves = [*load_arrays(dict(enumerate(jax.tree.leaves(abstract))), fill, told=told).values()]
    if report:
        report.say(f"loaded {name}: {sum(leaf.size for leaf in leaves):,} parameters, {leaves[0].dtype}")
    return jax.tree.unflatten(tree, leaves)


def not_decoded(
    found: Sequence[Video], model_id: str, plan: "DecodingPlan", arguments: argparse.Namespace
) -> list[Video]:
    """Return the videos that are not there, with the files that the options ask for, as this run would make them."""

    def is_decoded(video: Video) -> bool:
        wanted = json.loads(made(video, model_id, plan, arguments)["provenance"])
        try:
            there = [provenance.recorded(path) for path in (video.encoded, video.frames) if path]
        except UserError:
            return False
        return all(one.get(name) == wanted[name] for one in there for name in ("inputs", "plan"))

    return [video for video in found if not is_decoded(video)]


def scaled(stored: np.ndarray, plan: "DecodingPlan") -> np.ndarray:
    """Return stored latents as the decoder takes them: in the plan's dtype, without the scaling factor."""
    import jax.numpy as jnp

    return np.asarray(jnp.asarray(stored, plan.dtype) / plan.vae["scaling_factor"])


@dataclasses.dataclass(frozen=True)
class DecodingRun:
    """A run of stage 3 whose weights are on the devices."""

    model_id: str
    plan: "DecodingPlan"
    weights: Any
    arguments: argparse.Namespace
    hosts: Hosts
    report: Report

    def warm_up(self, stored: np.ndarray, compiled: "Sequence[Callable]", recorder: "Recorder | NoRecorder") -> None:
        """Run each program once, untimed, on stored latents, unless --no-warmup is given."""
        from cogvideox.models.vae.decoder import warm_up

        if not self.arguments.warmup:
            self.report.say("no warm-up: the seconds of the run hold what the first run of each program costs")
            return
        with self.report.phase("warm-up"):
            latents = scaled(stored, self.plan)
            warm_up([*map(recorder.ignoring, compiled)], self.weights, latents, self.plan.split)

    def decode_all(
        self,
        videos: Sequence[Video],
        compiled: "Sequence[Callable]",
        recorder: "Recorder | NoRecorder",
        profile: "Profile",
    ) -> np.ndarray:
        """Decode all videos, and return the scaled latents of the last one, [1, C, T, H, W]."""
        functions = [*map(recorder.recording, profile.traced(compiled, sum(self.plan.runs)))]
        total, strips, folder = 0.0, [], decoding_folder(self.arguments)
        # One video that goes elsewhere, such as with another rate, is not the one that the index is to name.
        is_listed = self.hosts.is_first and (len(videos) > 1 or videos[0].output is None)
        is_listed &= self.arguments.only is None  # the others of the folder may be under way elsewhere
        if is_listed:
            of_index.record(folder, [video.entry("denoised") for video in videos], only_forward=True)
        for n, video in enumerate(videos, 1):
            shown = Shown(self.plan.frames)
            latents, seconds = self.decode(video, functions, shown, f", video {n} of {len(videos)}" if n > 1 else "")
            total += seconds
            if is_listed:
                of_index.record(folder, [video.entry("decoded")])
                strips += [shown.strip] if n <= MOST_SHOWN else []
        self.report.add("per frame", f"{total / len(videos) / self.plan.frames:.3f} s")
        if len(videos) > 1:
            self.report.add("run of all videos", f"{total:.2f} s")
            if is_listed:
                self.draw_sheet(videos, strips)
        return latents

    def draw_sheet(self, videos: Sequence[Video], strips: Sequence[np.ndarray]) -> None:
        """Draw some frames of several videos, of at most MOST_SHOWN, with their prompts."""
        folder, around = decoding_folder(self.arguments), self.arguments.input_dir
        names = [f"{video.folder.relative_to(around)}: {video.config['prompt']}" for video in videos[:MOST_SHOWN]]
        first = f"the first {MOST_SHOWN} of " if len(videos) > MOST_SHOWN else ""
        title = f"{folder}: {first}{len(videos)} videos"
        contact_sheet.draw_grid(folder / SHEET, title, np.stack(strips), names)
        index = next_command.here(of_index.index_file(folder))
        self.report.say(f"wrote {folder / SHEET}, which shows the videos; {index} lists them")

    def decode(
        self, video: Video, functions: Sequence[Callable], shown: "Shown", label: str = ""
    ) -> tuple[np.ndarray, float]:
        """Decode latents and write the video, and its frames if asked for.

        Args:
            video: whose latents are read.
            functions: the compiled programs, see `chunk_programs`.
            shown: is given the frames that a contact sheet shows.
            label: the part of the phase's name after "run".

        Returns:
            The latents, scaled, [1, C, T, H, W], and the seconds of decoding and encoding.
        """
        from cogvideox.models.vae.decoder import decode

        latents = scaled(stage_files.read_latents(video.latents, allow_nan=True), self.plan)
        # What the video is made from is read before the timed run.
        made_of_video = made(video, self.model_id, self.plan, self.arguments)
        frames_file, report = video.frames, self.report
        fps = frames_per_second(video, self.arguments)
        with (
            report.phase(f"run, with encoding{label}", in_table=not label) as phase,
            self.hosts.claimed(video.encoded.parent, "stage3"),
            report.progress("decoding", "frame", self.plan.frames) as bar,
        ):
            chunks = shown.passing(decode(functions, self.weights, latents, self.plan.split))
            if self.hosts.is_first:
                frames = write_video(chunks, video.encoded, fps, made_of_video, bar, keep=frames_file is not None)
            else:
                collections.deque(chunks, maxlen=0)  # its share of each is decoded
        if frames_file and self.hosts.is_first:
            with report.phase("save frames"):
                save_frames(frames, frames_file, stage_files.made_from(video.config, LATENT_ENTRIES) | made_of_video)
        report.say(f"wrote {video.encoded}" + (f" and {frames_file}" if frames_file else ""))
        return latents, phase.seconds


def made(video: Video, model_id: str, plan: "DecodingPlan", arguments: argparse.Namespace) -> dict[str, str]:
    """Return the metadata that say what a video is made from, and how."""
    inputs = {provenance.known_as(video.latents, video.encoded.parent): provenance.digest(video.latents)}
    inputs |= provenance.weights(model_id, "vae", arguments.variant)
    decides = {
        "decoder": plan.decoder,
        "mesh": dict(plan.mesh.shape),
        "dtype": plan.dtype,
        "devices": f"{len(plan.devices)} x {plan.devices[0].device_kind}",
        "fps": frames_per_second(video, arguments),
    }
    return provenance.as_metadata("stage3", inputs, arguments, decides)


class Shown:
    """A few frames of a video, made small, for a contact sheet; `frames` is how many the video has."""

    def __init__(self, frames: int):
        self._numbers = {*np.linspace(0, frames - 1, SHOWN_FRAMES).round().astype(int).tolist()}
        self._found: list[np.ndarray] = []

    def passing(self, chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """Yield the chunks, uint8 [frames, height, width, 3], of a video, and keep what is shown."""
        from PIL import Image

        passed = 0
        for chunk in chunks:
            for number, frame in enumerate(chunk, passed):
                if number in self._numbers:
                    picture = Image.fromarray(frame)
                    picture.thumbnail((SHOWN_SIZE, SHOWN_SIZE))
                    self._found.append(np.asarray(picture))
            passed += len(chunk)
            yield chunk

    @property
    def strip(self) -> np.ndarray:
        """The frames beside each other, uint8 [height, width, 3]."""
        pictures = contact_sheet.enlarged(np.stack(self._found), SHOWN_SIZE // 2)
        lines = np.pad(pictures, [(0, 0), (0, 0), (0, 2), (0, 0)], constant_values=255)
        return np.concatenate(lines, axis=1)[:, :-2]


def report_plan(plan: "DecodingPlan", arguments: argparse.Namespace, report: Report) -> None:
    """Report the devices, and how a frame is split over them."""
    report.say(f"devices: {len(plan.devices)} x {plan.devices[0].device_kind}")
    reason = "as the options say" if arguments.chip_rows or arguments.strips else "the least work for each chip"
    report.say(f"split: {plan.split}; {reason}; the split does not change the result")


def frames_per_second(video: Video, arguments: argparse.Namespace) -> float:
    """Return the frame rate: the option's, or else that which stage 2 was told."""
    return arguments.fps or video.config["fps"]


def video_row(video: Video, plan: "DecodingPlan", arguments: argparse.Namespace) -> str:
    """Return what the closing table says of a video."""
    size = f"{plan.frames} frames, {plan.width} x {plan.height}"
    return f"{size}, {frames_per_second(video, arguments)} frames per second"


def write_video(
    chunks: Iterable[np.ndarray], path: Path, fps: float, made: Mapping[str, str], bar: Progress, keep: bool
) -> list[np.ndarray]:
    """Encode each chunk, uint8 [frames, height, width, 3], as soon as it is decoded; return the chunks if `keep`."""
    kept = []
    with writing.replacing(path) as temporary, video_writer(temporary, fps, made["provenance"]) as append:
        for frames in chunks:
            for frame in frames:
                append(frame)
            bar.update(len(frames))
            Interruption.check()
            if keep:
                kept.append(frames)
    return kept


def save_frames(chunks: Sequence[np.ndarray], path: Path, metadata: Mapping[str, str]) -> None:
    """Write the frames of all chunks as one tensor, uint8 [frames, height, width, 3], in a safetensors file."""
    from safetensors.numpy import save_file

    with writing.replacing(path) as temporary:
        save_file({"frames": np.concatenate(chunks)}, temporary, metadata=dict(metadata))
