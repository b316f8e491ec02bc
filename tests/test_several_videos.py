"""Several videos in one start: the same as each alone, and as diffusers' in torch; folders, reruns, refusals."""

import contextlib
import fcntl
import itertools
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import stage2_transformer
from cogvideox.files import videos, writing
from cogvideox.files.names import INDEX, SHEET, STATE, VIDEO
from cogvideox.models.transformer import throughput
from cogvideox.models.transformer.plan import make_denoising_plan
from cogvideox.run import hosts, jobs
from stage3_vae_decoder import parse_arguments
from tests import oracle
from tests.helpers import (
    CONFIG,
    EMBEDDINGS,
    LATENTS,
    SIZE,
    STAGE1,
    STAGE2,
    STAGE3,
    check,
    contents,
    edit_config,
    values,
)
from tests.in_process import run_here

PROMPTS = ["a red circle", "a green square, moving left"]
SEED, STEPS, SCALE = 7, 3, 3.5
OPTIONS = (*SIZE[:-2], "--num_inference_steps", STEPS, "--guidance_scale", SCALE, "--scheduler", "dpm")
TWO_SEEDS = ("--seed", SEED, "--num_videos_per_prompt", 2)
TOLERANCE = 1e-3  # of the latents' scale

FOLDERS = [f"prompt_000{n}/seed_{seed}" for n, seed in itertools.product((1, 2), (SEED, SEED + 1))]


def encoded(folder: Path, model: Path) -> Path:
    """Run stage 1 on a file of two prompts with an empty line between; return the folder of its files."""
    (folder / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n")
    options = ("--prompt_file", folder / "prompts.txt", "--negative_prompt", "dog", "--model_id", model)
    check(run_here(STAGE1, *options, "--output_dir", folder / "outputs", folder=folder))
    return folder / "outputs"


@pytest.fixture(scope="session")
def several(made_once, random_model) -> Path:
    """Make two videos of each of two prompts, one after the other on one device, with all three stages."""

    def make(folder: Path) -> None:
        outputs = encoded(folder, random_model)
        check(run_here(STAGE2, "--input_dir", outputs, *OPTIONS, *TWO_SEEDS, folder=folder))
        check(run_here(STAGE3, "--input_dir", outputs, folder=folder))

    return made_once("several", make) / "outputs"


@pytest.mark.parametrize(("number", "expected"), [(1, [[7], [3]]), (2, [[7, 8], [3, 4]])])
def test_the_seed_of_a_line(number, expected, tmp_path):
    """It stands in the place of --seed for its prompt alone, in a second run of stage 2 too."""
    for n, seed in ((1, {"seed": 5}), (2, {"seed": 5, "prompt_seed": 3})):  # where stage 2 has left its own
        (tmp_path / f"prompt_000{n}").mkdir()
        text = {"model_id": "m", "prompt": "a", "negative_prompt": ""} | seed
        (tmp_path / f"prompt_000{n}" / CONFIG).write_text(json.dumps(text))
    options = ["--input_dir", str(tmp_path), "--seed", str(SEED), "--num_videos_per_prompt", str(number)]
    found = jobs.videos_to_denoise(stage2_transformer.parse_arguments(options), tmp_path, hosts.Hosts())
    assert [video.config["seed"] for video in found] == [seed for seeds in expected for seed in seeds]
    assert jobs.seeds_of_lines(found) == ["taken from the prompt file: the seeds of 1 of 2 prompts"]


def check_against_diffusers(outputs: Path, model: Path) -> None:
    assert sorted(str(path.parent.relative_to(outputs)) for path in outputs.rglob(LATENTS)) == FOLDERS
    for folder in FOLDERS:
        ours = load_file(outputs / folder / LATENTS)["latents"]
        seed = int(folder.rpartition("_")[2])
        embeddings = (outputs / folder).parent / EMBEDDINGS
        theirs = oracle.latents(model, embeddings, STEPS, seed=seed, guidance_scale=SCALE, dpm=True)
        error = oracle.difference(ours, theirs)
        assert error <= TOLERANCE, f"{folder}: latents differ by {error:.1e} of their scale"


@pytest.mark.slow
def test_one_after_the_other(several, random_model, run_stage, tmp_path):
    """They are those of diffusers, and to the last bit those of a start for one of them; so are the frames."""
    check_against_diffusers(several, random_model)
    texts = [json.loads((several / folder / CONFIG).read_text())["prompt"] for folder in FOLDERS]
    assert texts == [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    assert all((several / folder / "output_video.mp4").stat().st_size for folder in FOLDERS)

    alone = tmp_path / "alone"
    prompt = several / "prompt_0002"
    run_stage(STAGE2, "--input_dir", prompt, "--output_dir", alone, *OPTIONS, "--seed", SEED + 1)
    assert values(alone / LATENTS) == values(several / FOLDERS[3] / LATENTS)
    assert json.loads((alone / CONFIG).read_text()) == json.loads((several / FOLDERS[3] / CONFIG).read_text())
    frames = [tmp_path / name for name in ("alone.safetensors", "one_of_several.safetensors")]
    run_stage(STAGE3, "--input_dir", alone, "--output_frames", frames[0], "--output_video", "video.mp4")
    options = ("--input_dir", several / FOLDERS[3], "--output_dir", "decoded")
    run_stage(STAGE3, *options, "--output_frames", frames[1])
    assert (tmp_path / "video.mp4").read_bytes() and (tmp_path / "decoded" / "output_video.mp4").read_bytes()
    assert {path.parent.name for path in tmp_path.rglob("timings.json")} == {"alone", "decoded"}
    found = jobs.videos_to_decode(parse_arguments(["--input_dir", str(several), "--output_dir", "new"], "torchax"))
    assert [str(video.encoded) for video in found] == [f"new/{folder}/output_video.mp4" for folder in FOLDERS]
    assert values(frames[0]) == values(frames[1])
    said = run_stage("utils.py", "status", several).stdout
    assert said.count("output_video.mp4: made") == 4 and "fits together" in said, said


def index(outputs: Path) -> list[dict]:
    return [json.loads(line) for line in (outputs / INDEX).read_text().splitlines()]


@pytest.mark.slow
def test_the_index(several, random_model, run_stage, tmp_path):
    """It has each video once, in the state in which the last stage left it, whichever of the folders is made again."""
    whole = [
        {"folder": folder, "prompt": PROMPTS[i // 2], "seed": SEED + i % 2, "file": f"{folder}/{VIDEO}"}
        for i, folder in enumerate(FOLDERS)
    ]
    whole = [entry | {"state": "decoded"} for entry in whole]
    assert index(several) == whole
    assert Image.open(several / SHEET).size[0] > 4 * 100

    outputs = shutil.copytree(several, tmp_path / "outputs")
    (outputs / FOLDERS[1] / LATENTS).unlink()
    run_stage(STAGE2, "--input_dir", outputs, *OPTIONS, *TWO_SEEDS)
    again = whole[1] | {"file": None, "state": "denoised"}
    assert index(outputs) == [whole[0], again, *whole[2:]]
    (outputs / INDEX).write_text("{broken")
    name = {"--output_video": "all/a.mov", "--output_frames": "all/a.safetensors"}
    printed = run_stage(STAGE3, "--input_dir", outputs, *itertools.chain(*name.items())).stdout
    for entry in index(outputs):
        stem = f"all/a_{entry['folder'].replace('/', '_')}"
        assert f"wrote {stem}.mov and {stem}.safetensors" in printed, printed
        assert (tmp_path / f"{stem}.mov").samefile(outputs / entry["file"])
        assert (tmp_path / f"{stem}.safetensors").stat().st_size
    assert len(index(outputs)) == 4

    shutil.rmtree(outputs / "prompt_0002")
    (outputs / FOLDERS[0] / VIDEO).unlink()
    said = run_stage("utils.py", "status", outputs).stdout
    assert said.count("a_prompt_0001_seed_7.mov: made") == 1 and "fits together" in said, said
    edit_config(outputs / "prompt_0001", negative_prompt="a cat")
    said = run_stage("utils.py", "status", outputs).stdout
    options = f"--prompt_file {several.parent / 'prompts.txt'} --output_dir {outputs} --model_id {random_model}"
    assert said.strip().endswith(f"{STAGE1} {options} --negative_prompt 'a cat'"), said
    (outputs / "prompt_0001" / EMBEDDINGS).unlink()
    words = shlex.split(run_stage("utils.py", "status", outputs).stdout.strip().splitlines()[-1])
    run_stage(STAGE1, *words[3:])
    assert words[3:6] == ["--prompt=a red circle", "--output_dir", str(outputs / "prompt_0001")], words
    of_prompt = {"folder": "prompt_0001", "seed": None, "file": None, "state": "encoded"}
    assert index(outputs) == [whole[0] | of_prompt]
    run_stage(STAGE2, "--input_dir", outputs / "prompt_0001", *OPTIONS, *TWO_SEEDS, "--restart")
    assert index(outputs) == [entry | {"file": None, "state": "denoised"} for entry in whole[:2]]
    assert not (outputs / "prompt_0001" / INDEX).exists()


@pytest.mark.slow
def test_status_of_videos_that_stage_2_did_not_come_to(several, run_stage, tmp_path):
    """They are named, and the command makes them too: with all seeds, and no others."""
    outputs = shutil.copytree(several, tmp_path / "outputs")
    shutil.rmtree(outputs / FOLDERS[3])
    said = run_stage("utils.py", "status", outputs).stdout
    assert f"{FOLDERS[3]}/{LATENTS}: is not there" in said, said
    words = shlex.split(said.strip().splitlines()[-1])
    assert Path(words[2]).name == STAGE2, said
    printed = run_stage(STAGE2, *words[3:]).stdout
    assert "already finished: 3 of 4" in printed and printed.strip().endswith(f"{STAGE3} --input_dir {outputs}"), (
        printed
    )
    assert values(outputs / FOLDERS[3] / LATENTS) == values(several / FOLDERS[3] / LATENTS)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "at_once"), [("random_model", None), ("other_model", None), ("random_model", 3)])
def test_split_over_devices(model, at_once, request, run_stage, tmp_path):
    """dp takes the videos apart; three at a time leave a second group of one."""
    model = request.getfixturevalue(model)
    outputs = encoded(tmp_path, model)
    options = ("--videos_at_once", at_once, "--sp_num", 1) if at_once else ()
    printed = run_stage(
        STAGE2, "--input_dir", outputs, *OPTIONS, *TWO_SEEDS, *options, virtual_devices=True, status=0
    ).stdout
    expected = "4 videos, 3 at a time: as --videos_at_once says" if at_once else "4 videos, 4 at a time: dp 8 makes"
    assert expected in printed, printed
    check_against_diffusers(outputs, model)


@pytest.mark.slow
def test_a_rerun_makes_what_is_missing(several, run_stage, tmp_path):
    """A rerun with other settings makes all again."""
    outputs = shutil.copytree(several, tmp_path / "outputs")
    (outputs / FOLDERS[2] / LATENTS).unlink()
    before = contents(outputs)
    printed = run_stage(STAGE2, "--input_dir", outputs, *OPTIONS, *TWO_SEEDS).stdout
    assert "already finished: 3 of 4 videos" in printed, printed
    after = contents(outputs)
    changed = {name for name in after if before.get(name) != after[name]} - {"timings.json", INDEX}
    assert f"{FOLDERS[2]}/{LATENTS}" in changed and all(name.startswith(FOLDERS[2]) for name in changed), changed
    assert values(outputs / FOLDERS[2] / LATENTS) == values(several / FOLDERS[2] / LATENTS)
    printed = run_stage(STAGE2, "--input_dir", outputs, *OPTIONS, *TWO_SEEDS).stdout
    assert "already finished: 4 of 4" in printed and contents(outputs) == after, printed
    printed = run_stage(STAGE2, "--input_dir", outputs, *OPTIONS, *TWO_SEEDS, "--guidance_scale", 2).stdout
    assert "already finished" not in printed and printed.count("wrote") == 4, printed


@pytest.mark.slow
def test_only_some_of_the_prompts(several, random_model, run_stage, tmp_path):
    """They are those of a start for all, in the same folders; nothing else is touched, and nothing is made twice."""
    outputs, second = tmp_path / "outputs", "prompt_0002"
    given = ("--prompt_file", several.parent / "prompts.txt", "--negative_prompt", "dog", "--model_id", random_model)
    printed = run_stage(STAGE1, *given, "--output_dir", outputs, "--only", 2).stdout
    assert printed.strip().endswith(f"{STAGE2} --input_dir {outputs} --only 2"), printed
    options = ("--input_dir", outputs, *OPTIONS, *TWO_SEEDS, "--only", 2)
    with held(outputs):  # another process may have the folder around
        printed = run_stage(STAGE2, *options).stdout
    assert printed.strip().endswith(f"{STAGE3} --input_dir {outputs} --only 2"), printed
    run_stage(STAGE3, "--input_dir", outputs, "--only", 2, "--output_frames", tmp_path / "frames.safetensors")
    for folder in FOLDERS[2:]:
        assert values(outputs / folder / LATENTS) == values(several / folder / LATENTS)
        assert (tmp_path / f"frames_{folder.replace('/', '_')}.safetensors").stat().st_size
    found = {str(path.relative_to(outputs)) for path in outputs.rglob("*") if path.is_file()}
    of_videos = {f"{folder}/{name}" for folder in FOLDERS[2:] for name in (CONFIG, LATENTS, VIDEO)}
    assert found == of_videos | {f"{second}/{name}" for name in (CONFIG, EMBEDDINGS, "timings.json")}

    run_stage(STAGE1, *given, "--output_dir", outputs, "--only", "1-2")
    edit_config(outputs / FOLDERS[2], height=None)  # as stage 1 leaves the config of a single video
    before = {path: path.stat().st_mtime_ns for path in outputs.rglob("*seed*/*") if path.name != CONFIG}
    assert "already finished: 2 of 2" in run_stage(STAGE2, *options).stdout
    assert "already decoded: all videos" in run_stage(STAGE3, "--input_dir", outputs, "--only", 2).stdout
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert json.loads((outputs / FOLDERS[2] / CONFIG).read_text())["height"] == 32

    for script, words, error in (
        (STAGE1, (*given, "--only", 3), "'3' is not within 1 to 2"),
        (STAGE1, ("--prompt", "a", "--model_id", random_model, "--only", 1), "is for the prompts of a --prompt_file"),
        (STAGE2, ("--input_dir", outputs, "--only", "0-1"), "'0-1' is not within 1 to 2"),
        (STAGE3, ("--input_dir", outputs / second, "--only", 1), "is for the folder of several prompts"),
    ):
        said = run_stage(script, *words, status=2).stderr
        assert error in said and said.count("\n") == 1, said
    said = run_stage("utils.py", "status", outputs).stdout
    assert "Next: " in said and "--only" not in said, said
    (outputs / "prompt_0001").rename(outputs / "prompt_0003")
    assert "prompt_0001 is not there" in run_stage(STAGE2, *options[:-1], "1-3", status=2).stderr


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder as another process would."""
    with open(folder / writing.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    (folder / writing.LOCK).unlink()


@pytest.mark.slow
def test_a_state_of_videos_at_a_time_is_no_obstacle(several, run_stage, tmp_path):
    """A fleet may divide a group that was interrupted; what it had of two videos at a time is of no use for one."""
    outputs = shutil.copytree(several, tmp_path / "outputs")
    prompt = outputs / "prompt_0001"
    options = ("--input_dir", outputs, *OPTIONS, "--videos_at_once", 2, "--only")
    for folder in FOLDERS:
        shutil.rmtree(outputs / folder)
    with mock.patch.object(jobs.Task, "save", side_effect=KeyboardInterrupt):
        run_stage(STAGE2, *options, "1-2", "--checkpoint_every", 1, status=130)
    assert (prompt / STATE).exists()
    printed = run_stage(STAGE2, *options, 1).stdout
    assert "WARNING" in printed and "starts over" in printed and (prompt / LATENTS).exists(), printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ("prompts.txt cannot be read", "No such file")),
        (b"\n  \n", ("prompts.txt has no prompt", "one on each line")),
        (b"a\nb\xff\n", ("prompts.txt cannot be read", "UTF-8")),
        (b"a\n\n" + b"red " * 300, ("prompts.txt, line 3, is longer than 226 tokens", "make it shorter")),
        (b"red " * 300, ("prompts.txt, line 1, is longer than 226 tokens", "make it shorter")),
    ],
    ids=["no file", "empty", "not UTF-8", "a long line", "only a long line"],
)
def test_wrong_prompt_files(text, words, random_model, run_stage, tmp_path):
    if text is not None:
        (tmp_path / "prompts.txt").write_bytes(text)
    options = ("--model_id", random_model, "--output_dir", "out")
    error = run_stage(STAGE1, "--prompt_file", "prompts.txt", *options, status=2).stderr
    assert error.count("\n") == 1 and all(word in error for word in words), error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_folders_that_do_not_fit_together(several, random_model, run_stage, tmp_path):
    """What a later stage would confuse with the videos of this run is refused by name."""
    outputs = shutil.copytree(several, tmp_path / "outputs")
    one = tmp_path / "one.txt"
    one.write_text("a cat\n")
    cases = [
        (
            STAGE1,
            ("--prompt_file", one, "--model_id", random_model, "--output_dir", outputs),
            "prompt_0002 has another",
        ),
        (STAGE1, ("--prompt", "a cat", "--model_id", random_model, "--output_dir", outputs), "prompt_0001 has another"),
        (STAGE2, ("--input_dir", outputs, *OPTIONS), "seed_7: the folder of another video"),
        (STAGE2, ("--input_dir", outputs, *OPTIONS, *TWO_SEEDS, "--dump", "d"), "--dump takes one video"),
        (STAGE2, ("--input_dir", outputs, *TWO_SEEDS, "--seed", 2**64 - 1), "--num_videos_per_prompt exceed"),
        (STAGE3, ("--input_dir", outputs, "--dump", "d"), "--dump is for one video"),
    ]
    for script, options, words in cases:
        error = run_stage(script, *options, status=2).stderr
        assert error.count("\n") == 1 and words in error, f"{script}: {error}"
    (outputs / FOLDERS[1] / CONFIG).write_text(
        (outputs / FOLDERS[1] / CONFIG).read_text().replace('"width": 48', '"width": 64')
    )
    error = run_stage(STAGE3, "--input_dir", outputs, status=2).stderr
    assert "has width 64, and" in error and error.count("\n") == 1, error


def test_order_of_folders(tmp_path):
    """By their numbers; what is no number, and no folder, is none."""
    for name in ("seed_10", "seed_9", "seed_x", "seed_"):
        (tmp_path / name).mkdir()
    (tmp_path / "seed_1").touch()
    assert videos.videos(tmp_path) == [tmp_path / "seed_9", tmp_path / "seed_10"]
    assert videos.prompts(tmp_path) == [tmp_path]


@pytest.mark.parametrize(
    ("devices", "number", "guided", "expected"),
    [
        (1, 8, True, 1),  # nothing is exchanged anyway
        (8, 1, True, 1),
        (8, 8, True, 4),  # with two samples each, eight chips exchange nothing
        (8, 8, False, 8),
        (8, 4, True, 4),
        (8, 5, True, 1),  # a second group of four would be mostly empty
        (8, 6, True, 2),
        (4, 6, False, 2),
        (4, 12, False, 4),
    ],
)
def test_videos_at_once(devices, number, guided, expected):
    """The videos' own products are the same in all cases; what differs are exchanges and empty places."""
    chips = jax.devices()[:devices]

    def make(batch):
        return make_denoising_plan(
            transformer=json.loads(Path("configs/CogVideoX1.5-5B/transformer/config.json").read_text()),
            vae=json.loads(Path("configs/CogVideoX1.5-5B/vae/config.json").read_text()),
            scheduler=json.loads(Path("configs/CogVideoX1.5-5B/scheduler/scheduler_config.json").read_text()),
            **{"height": 768, "width": 1360, "frames": 81, "num_inference_steps": 10},
            guidance_scale=6.0 if guided else 1.0,
            devices=chips,
            platform="cpu",
            batch=batch,
        )

    plan = throughput.fastest(make, number, devices)
    times = {batch: make(batch).step_seconds / batch for batch in (1, 2, 4, 8) if devices % batch == 0}
    assert plan.batch == expected, f"{plan.batch} at once; seconds a video: {times}"
    assert np.argmin(list(times.values())) > 0 or devices == 1, times


class Exchange:
    """What jax's service of key and value does, in one process."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value):
        self.values[key] = value

    def blocking_key_value_get(self, key, _):
        return self.values[key]

    key_value_set_bytes, blocking_key_value_get_bytes = key_value_set, blocking_key_value_get


def test_other_hosts_get_the_files_of_all_folders(several, tmp_path, monkeypatch):
    exchange = Exchange()
    monkeypatch.setattr(hosts, "_client", lambda: exchange)
    for process in (0, 1):
        hosts.Hosts(process)._share_inputs(several, (CONFIG, LATENTS), tmp_path)
    copied = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    prompts = {f"{folder.partition('/')[0]}/{CONFIG}" for folder in FOLDERS}
    assert copied == prompts | {f"{folder}/{name}" for folder in FOLDERS for name in (CONFIG, LATENTS)}
    assert all((tmp_path / name).read_bytes() == (several / name).read_bytes() for name in copied)
    assert [path.name for path in videos.videos(tmp_path)] == [folder.rpartition("/")[2] for folder in FOLDERS]
