"""The videos of a run: where their files are, what is written with each, and which of them are made at a time.

The folders of several videos are those of `cogvideox.files.videos`; a single one is a run of one video.
"""

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from safetensors import SafetensorError

from cogvideox.cli.report import Report
from cogvideox.defaults import IMAGE_LATENT_SCALES, MOST_SEED
from cogvideox.errors import UserError
from cogvideox.files import checkpoint, numbers, provenance, stage_files, videos, writing
from cogvideox.files.lora import Lora
from cogvideox.files.names import CONFIG, EMBEDDINGS, GIVEN_TENSORS, LATENTS, SHEET, TIMINGS, VIDEO
from cogvideox.files.schemas import LATENT_ENTRIES, TEXT_ENTRIES, VIDEO_ENTRIES, TextConfig, VideoConfig
from cogvideox.files.state import StateFile, fingerprint_of
from cogvideox.models.shared.sizes import spatial_compression_ratio
from cogvideox.run import sparse_maps
from cogvideox.run.hosts import Hosts
from cogvideox.versions import versions

if TYPE_CHECKING:
    import numpy as np

    from cogvideox.models.transformer.plan import DenoisingPlan
    from cogvideox.models.vae.plan import DecodingPlan

SIZE = ("height", "width", "frames")


@dataclasses.dataclass(frozen=True)
class Video:
    """A video to make.

    Attributes:
        folder: of its own files.
        config: the entries of generation_config.json that are known when the stage begins.
        prompt_folder: of stage 1's files, if it is another one.
        output: the file of the encoded video, if it is another one than `folder` / VIDEO.
        frames: the file of --output_frames, if it is asked for.
    """

    folder: Path
    config: Mapping
    prompt_folder: Path | None = None
    output: Path | None = None
    frames: Path | None = None

    @property
    def embeddings(self) -> Path:
        """The file of its prompt's embeddings."""
        return (self.prompt_folder or self.folder) / EMBEDDINGS

    @property
    def latents(self) -> Path:
        """The file of its latents."""
        return self.folder / LATENTS

    @property
    def encoded(self) -> Path:
        """The file of the encoded video."""
        return self.output or self.folder / VIDEO

    def entry(self, state: str) -> videos.Entry:
        """Return the line of the index for a video in this state."""
        file = self.encoded if state == "decoded" else None
        return videos.Entry(self.folder, self.config["prompt"], self.config["seed"], file, state)


def check_model(found: Sequence[Video], model_id: str | None, refuse: Callable[[str], None]) -> str:
    """Return the model of all videos; raise UserError unless they have one. See `checkpoint.same_model`."""
    used = found[0].config["model_id"]
    for video in found:
        if video.config["model_id"] != used:
            where = video.prompt_folder or video.folder
            raise UserError(f"{where} was made with model '{video.config['model_id']}', not '{used}'")
    return checkpoint.same_model(model_id, used, refuse)


# --- Stage 2 -----------------------------------------------------------------------------------------------------


def videos_to_denoise(arguments: argparse.Namespace, output_dir: Path, hosts: Hosts) -> list[Video]:
    """Return the videos to make: of each prompt in --input_dir as many as --num_videos_per_prompt says.

    Their seeds begin with the one that the prompt's line of --prompt_file says, or else with --seed.

    Raises:
        UserError: stage 1's files are missing or wrong, or other videos are in the way.
    """
    found = []
    for source in videos.prompts(arguments.input_dir, arguments.only):
        text = stage_files.read_config(source, TextConfig)
        seeds = videos.seeds(text, arguments.seed, arguments.num_videos_per_prompt)
        if seeds[-1] > MOST_SEED:
            raise UserError(f"--seed {seeds[0]} and those after it for --num_videos_per_prompt exceed {MOST_SEED}")
        folder = output_dir / source.relative_to(arguments.input_dir)
        folders = [videos.of_seed(folder, seed) for seed in seeds] if len(seeds) > 1 else [folder]
        if hosts.is_first:
            videos.check_videos(folder, folders)
        found += [Video(own, text | {"seed": seed}, source) for own, seed in zip(folders, seeds, strict=True)]
    if arguments.dump and len(found) > 1:
        raise UserError(f"--dump takes one video, and there are {len(found)}; give the --input_dir of one prompt")
    return found


def check_files_to_denoise(
    found: Sequence[Video],
    arguments: argparse.Namespace,
    output_dir: Path,
    loras: Sequence[Lora],
    hosts: Hosts,
    report: Report,
) -> tuple[str, dict[Path, dict[str, tuple[int, ...]]]]:
    """Check the files of the videos.

    Returns:
        The model that stage 1 used, and the shapes of the tensors, by name, in each of its files.

    Raises:
        UserError: a file is wrong or would replace another one.
    """
    configs = {video.embeddings: video.config for video in found}
    shapes = {}
    for path, config in configs.items():
        names = stage_files.embedding_names(path)
        shapes[path] = stage_files.tensor_shapes(path, 1, names, config, refuse=report.refuse, warn=report.warn)
    for path in shapes:
        provenance.check_inputs(path, report.refuse)
    model_id = check_model(found, arguments.model_id, stage_files.refuse)
    outputs = [video.folder / name for video in found for name in (LATENTS, CONFIG)]
    lora_files = [file for one in loras for file in one.files]
    sparse_map = arguments.sparse_attention if isinstance(arguments.sparse_attention, Path) else None
    inputs = [*shapes, *lora_files, sparse_map, arguments.executable, arguments.log_json]
    outputs += [videos.index_file(output_dir)] if len(found) > 1 else []
    there = [("--output_dir", path) for path in outputs if hosts.is_first and path.parent.is_dir()]
    writing.check_outputs(there, inputs, model_id)
    return model_id, shapes


def seeds_of_lines(found: Sequence[Video]) -> list[str]:
    """Return a line that says how many of the prompts have seeds from their lines of --prompt_file, if any have."""
    prompts = {video.embeddings: video.config.get("prompt_seed") is not None for video in found}
    told = sum(prompts.values())
    return [f"taken from the prompt file: the seeds of {told} of {len(prompts)} prompts"] if told else []


def complete_size(
    arguments: argparse.Namespace, shapes: Mapping[Path, Mapping[str, tuple[int, ...]]], model_id: str
) -> list[str]:
    """Set --height and --width where nobody gives them and stage 1 has encoded an image; with a video --frames, too.

    `shapes` are those of the tensors in each of stage 1's files. Returns a line that says so.
    """
    of_files = [of_file for of_file in shapes.values() if of_file.keys() - set(stage_files.TEXT_TENSORS)]
    if not of_files:
        return []
    vae = checkpoint.read_config(model_id, "vae")
    name = next(name for name, tensors in GIVEN_TENSORS.items() if of_files[0].keys() & set(tensors))
    frames, *sides = of_files[0][GIVEN_TENSORS[name][0]][2:] or [0]  # of wrong files there are fewer
    sizes = dict(zip(("height", "width"), (side * spatial_compression_ratio(vae) for side in sides), strict=False))
    if name == "video":
        sizes["frames"] = (frames - 1) * vae["temporal_compression_ratio"] + 1
    found = {option: size for option, size in sizes.items() if getattr(arguments, option) is None}
    vars(arguments).update(found)
    return [f"taken from the {name}: {' '.join(f'--{n} {size}' for n, size in found.items())}"] if found else []


def strength_of(found: Sequence[Video]) -> float | None:
    """Return the strength with which given videos are changed, which is one for all; None without such videos.

    Raises:
        UserError: it is not the same for all.
    """
    first = found[0].config.get("strength")
    for video in found:
        if (other := video.config.get("strength")) != first:
            raise UserError(
                f"{video.embeddings.parent} has strength {other}, and {found[0].embeddings.parent} has {first}; give "
                "the folder of one of them as --input_dir"
            )
    return first


def check_image_scale(arguments: argparse.Namespace, plan: "DenoisingPlan") -> None:
    """Raise UserError if --image_latent_scale is given, and the model takes no image."""
    if arguments.image_latent_scale != IMAGE_LATENT_SCALES[0] and not plan.features.image:
        raise UserError(f"--image_latent_scale {arguments.image_latent_scale} is for models that take an image")


def check_embeddings(shapes: Mapping[Path, Mapping[str, tuple[int, ...]]], plan: "DenoisingPlan") -> None:
    """Raise UserError unless the transformer of the plan takes tensors of these shapes, by file and name."""
    frames, height, width = plan.latent_size
    channels = plan.transformer["out_channels"]
    compression = plan.vae["temporal_compression_ratio"], spatial_compression_ratio(plan.vae)
    image = (1, channels, 1, height, width) if plan.features.image else None
    video = (1, channels, frames, height, width) if plan.strength is not None else None
    for path, of_file in shapes.items():
        stage_files.check_embeddings(of_file, plan.transformer, path)
        stage_files.check_given("image", of_file, image, compression, path)
        stage_files.check_given("video", of_file, video, compression, path)


class Task(NamedTuple):
    """What is written with a video's latents.

    Attributes:
        video: which.
        config: the entries that generation_config.json has after stage 2.
        inputs, plan: see `provenance.as_metadata`.
        fingerprint: all that the latents depend on, to the last bit, by names for people.
    """

    video: Video
    config: Mapping
    inputs: Mapping[str, str]
    plan: Mapping[str, object]
    fingerprint: dict[str, str]

    @property
    def is_finished(self) -> bool:
        """Whether the latents that this task would write are there."""
        try:
            found = fingerprint_of(stage_files.metadata(self.video.latents))
            return not provenance.differences(json.loads(found or "{}"), self.fingerprint)
        except (OSError, SafetensorError, ValueError, AttributeError):
            return False

    def complete_config(self) -> None:
        """Write the config of finished latents again if stage 1, which writes its own entries alone, came after."""
        with contextlib.suppress(UserError):
            stage_files.read_config(self.video.folder, VideoConfig)
            return
        with writing.committing(self.video.folder, "stage2") as new:
            stage_files.write_config(new, self.config)

    def made(self, arguments: argparse.Namespace) -> dict[str, str]:
        """Return the metadata that say what the latents, and what lies on the way to them, are made from."""
        made_from = stage_files.made_from(self.config, LATENT_ENTRIES)
        return made_from | provenance.as_metadata("stage2", self.inputs, arguments, self.plan)

    def save(self, latents: "np.ndarray", arguments: argparse.Namespace) -> None:
        """Write the latents [1, C, T, H, W] and the config to the folder of the video."""
        import numpy as np
        from safetensors.numpy import save_file

        metadata = self.made(arguments) | {"fingerprint": json.dumps(self.fingerprint)}
        with writing.committing(self.video.folder, "stage2") as new:
            save_file({"latents": np.ascontiguousarray(latents)}, new / LATENTS, metadata=metadata)
            stage_files.write_config(new, self.config)


def tasks_of(
    found: Sequence[Video],
    arguments: argparse.Namespace,
    plan: "DenoisingPlan",
    skipped: Sequence[int],
    loras: Sequence[Lora],
    sparse_map: Path | None = None,
) -> list[Task]:
    """Return the tasks of the videos; each file that they are made from, `sparse_map` among them, is read once."""
    digests = {path: provenance.digest(path) for path in {video.embeddings: None for video in found}}
    weights = weights_of(found[0].config["model_id"], loras, arguments.variant)
    of_plan = {
        "scheduler": plan.scheduler["_class_name"],
        "timestep_spacing": plan.scheduler.get("timestep_spacing"),
        "skipped_steps": numbers.as_text(skipped),
        "sparse_attention": str(sparse_map) if sparse_map else None,
        "dense_steps": plan.sparse.dense_steps if plan.sparse else None,
    }
    of_map = {str(sparse_map): provenance.file_digest(sparse_map)} if sparse_map else {}
    content = {"sparse_attention": of_map.get(str(sparse_map))}  # of the map, which may lie elsewhere
    of_run = plan.program_options | {
        "dtype": plan.dtype,
        "devices": f"{len(plan.devices)} x {plan.devices[0].device_kind}",
    }
    if plan.features.image:
        of_run["image_latent_scale"] = arguments.image_latent_scale
    if plan.strength is not None:
        of_run["steps"] = plan.steps
    if plan.sparse:
        of_run["sparse heads"] = sparse_maps.heads_in_words(plan.sparse)

    def task(video: Video) -> Task:
        known = vars(arguments) | of_plan | {"seed": video.config["seed"]}
        config = {name: video.config[name] for name in TEXT_ENTRIES if name in video.config}
        config |= {name: known[name] for name in VIDEO_ENTRIES}
        inputs = {provenance.known_as(video.embeddings, video.folder): digests[video.embeddings]}
        inputs |= weights
        made_from = {name: config[name] for name in LATENT_ENTRIES if name in config}
        fingerprint = made_from | of_run | inputs | content
        fingerprint |= versions("jax", "jaxlib", "libtpu", "torch")
        return Task(video, config, inputs | of_map, of_run, {name: str(value) for name, value in fingerprint.items()})

    return [task(video) for video in found]


def weights_of(model_id: str, loras: Sequence[Lora], variant: str | None) -> dict[str, str]:
    """Return the digests of the weights of a run of stage 2, of LoRAs and model, by what they are known as."""
    files = [file for one in loras for file in one.files]
    return {str(file): provenance.digest_in_state(file) for file in files} | provenance.weights(
        model_id, "transformer", variant
    )


class Group(NamedTuple):
    """Tasks that are done at a time, the file that keeps their state, and what that has of an unfinished run."""

    tasks: list[Task]
    state_file: StateFile
    saved: "Mapping[str, np.ndarray] | None"


def groups_of(
    tasks: list[Task], plan: "DenoisingPlan", arguments: argparse.Namespace, hosts: Hosts, report: Report
) -> list[Group]:
    """Divide the tasks into groups that are done at a time, without those of several that are finished already."""
    keeps_state = not arguments.dump and not hosts.are_many
    todo = tasks
    if len(tasks) > 1:
        report.say(f"{len(tasks)} videos, {plan.batch} at a time: {reason_for_batch(plan, arguments)}")
    if (len(tasks) > 1 or arguments.only) and keeps_state and not arguments.restart:
        todo = []
        for task in tasks:
            if task.is_finished:
                task.complete_config()
            else:
                todo.append(task)
    if len(todo) < len(tasks):
        report.say(f"already finished: {len(tasks) - len(todo)} of {len(tasks)} videos; --restart makes them again")
    groups = []
    for i in range(0, len(todo), plan.batch):
        group = todo[i : i + plan.batch]
        fingerprint = group[0].fingerprint.copy()
        for task in group[1:]:
            fingerprint |= {f"{name} of {task.video.folder}": value for name, value in task.fingerprint.items()}
        every, about = arguments.checkpoint_every if keeps_state else 0, group[0].made(arguments)
        state_file = StateFile(group[0].video.folder, fingerprint, every, about)
        groups.append(Group(group, state_file, kept_state(state_file, arguments, report) if keeps_state else None))
    return groups


def kept_state(
    state_file: StateFile, arguments: argparse.Namespace, report: Report
) -> "Mapping[str, np.ndarray] | None":
    """Return the state of an unfinished run, None if there is none or if it is to start over; see `StateFile.load`.

    With --only the state of another run is passed over: it may be that of videos which were made at a time elsewhere.
    """
    try:
        return state_file.load(arguments.restart)
    except UserError as error:
        if arguments.only is None:
            raise
        report.warn(f"{error}; --only starts over, too")
        return state_file.load(restart=True)


def record_start(tasks: Sequence[Task], groups: Sequence[Group], output_dir: Path) -> None:
    """Put the videos of a run into the index: those of the groups are to be made, the others are finished."""
    todo = [task for group in groups for task in group.tasks]
    finished = [task.video.entry("denoised") for task in tasks if task not in todo]
    videos.record(output_dir, finished, only_forward=True)
    videos.record(output_dir, [task.video.entry("encoded") for task in todo])


def reason_for_batch(plan: "DenoisingPlan", arguments: argparse.Namespace) -> str:
    """Say why a group has as many videos as it has."""
    if arguments.videos_at_once:
        return "as --videos_at_once says"
    if plan.batch == 1:
        return "more would not make more of them an hour"
    return f"dp {plan.parallelism.mesh.shape['dp']} makes the most of them an hour, by prediction"


# --- Stage 3 -----------------------------------------------------------------------------------------------------


def videos_to_decode(arguments: argparse.Namespace) -> list[Video]:
    """Return the videos whose latents are in --input_dir, or in folders there.

    Raises:
        UserError: a config is missing or wrong, or the options are for a single video, or sizes differ.
    """
    folders = videos.videos(arguments.input_dir, arguments.only)
    are_many = len(folders) > 1 or len(videos.prompts(arguments.input_dir)) > 1
    if len(folders) > 1 and arguments.dump:
        raise UserError(
            f"--dump is for one video, and {arguments.input_dir} has {len(folders)}; give the folder of one as "
            "--input_dir"
        )

    def of_video(path: Path | None, folder: Path) -> Path | None:
        """Return the file that an option names, of several videos with the name of the video's folder in it."""
        if path is None or not are_many:
            return path
        return path.with_name(f"{path.stem}_{videos.label(folder, arguments.input_dir)}{path.suffix}")

    found = [
        Video(
            folder,
            stage_files.read_config(folder, VideoConfig),
            output=of_video(arguments.output_video, folder) or video_elsewhere(folder, arguments),
            frames=of_video(arguments.output_frames, folder),
        )
        for folder in folders
    ]
    for video in found[1:]:
        for name in (*SIZE, "model_id"):
            ours, first = video.config[name], found[0].config[name]
            if ours != first:
                raise UserError(
                    f"{video.folder} has {name} {ours}, and {found[0].folder} has {first}; decode each alone, with its "
                    "folder as --input_dir"
                )
    return found


def video_elsewhere(folder: Path, arguments: argparse.Namespace) -> Path | None:
    """Return the file in --output_dir of the video whose latents are in `folder`; None without that option."""
    if not arguments.output_dir:
        return None
    return arguments.output_dir / folder.relative_to(arguments.input_dir) / VIDEO


def places_of(found: Sequence[Video], arguments: argparse.Namespace) -> list[Path]:
    """Return where in `decoding_folder` each video goes."""
    return [decoding_folder(arguments) / video.folder.relative_to(arguments.input_dir) for video in found]


def decoding_folder(arguments: argparse.Namespace) -> Path:
    """Return the folder of the timings, and of what --output_video and --output_frames do not name."""
    return arguments.output_dir or arguments.input_dir


def check_files_to_decode(
    found: Sequence[Video], arguments: argparse.Namespace, hosts: Hosts, report: Report
) -> tuple[str, dict[Path, tuple[int, ...]]]:
    """Check the files of the videos.

    Returns:
        The model that the stages before used, and the shapes of the latents in each of their files.

    Raises:
        UserError: a file is wrong or would replace another one.
    """
    shapes = {}
    for video in found:
        shapes[video.latents] = stage_files.tensor_shapes(
            video.latents, 2, ("latents",), video.config, finite=False, refuse=report.refuse, warn=report.warn
        )["latents"]
        provenance.check_inputs(video.latents, report.refuse)
    model_id = check_model(found, arguments.model_id, report.refuse)
    option = "--output_video" if arguments.output_video or not arguments.output_dir else "--output_dir"
    options: list[tuple[str, Path | None]] = [(option, video.encoded) for video in found]
    options += [("--output_frames", video.frames) for video in found]
    if len(found) > 1 and not arguments.only:
        folder = decoding_folder(arguments)
        options += [("--output_dir", path) for path in (videos.index_file(folder), folder / SHEET)]
    configs = [video.folder / CONFIG for video in found]
    timings = decoding_folder(arguments) / TIMINGS
    given = {Path(file) for video in found for name in GIVEN_TENSORS if (file := video.config.get(name))}
    inputs = [*shapes, *configs, *given, timings, arguments.executable, arguments.log_json]
    writing.check_outputs(options if hosts.is_first else [], inputs, model_id)
    return model_id, shapes


def check_latents(
    found: Sequence[Video],
    shapes: Mapping[Path, tuple[int, ...]],
    plan: "DecodingPlan",
    arguments: argparse.Namespace,
) -> None:
    """Raise UserError unless all latents fit the plan and are finite, before hours go into the first of them."""
    for path, shape in shapes.items():
        stage_files.check_latents_shape(shape, plan.latent_shape, path)
    for video in found[1:]:
        stage_files.read_latents(video.latents, arguments.allow_nan)
