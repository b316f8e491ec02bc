"""The fleet's command line, its places, and what it takes for made; none of it needs Ray."""

import errno
import importlib.util
import itertools
import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cogvideox.errors import UserError
from cogvideox.files import checkpoint, prompts, writing
from cogvideox.files.names import LATENTS, VIDEO
from cogvideox.run import warm
from fleet import found
from fleet.__main__ import main
from fleet.found import State
from fleet.options import REFUSED, parse
from fleet.places import ON_CPU, places
from fleet.worker import Worker, of_message
from tests.helpers import ROOT, SIZE, STAGE1, STAGE2, STAGE3, TINY_MODEL, check, edit_config, edit_latents
from tests.in_process import run_here

FILE = ("--prompt_file", "prompts.txt", "--model_id", str(TINY_MODEL))


def test_each_option_goes_to_the_stages_that_have_it():
    options = ["--height", "64", "--preset", "authors", "--output_frames", "f.safetensors", "--dtype", "bfloat16"]
    options += ["--negative_prompt=--dog", "--lora", "a.safetensors:-0.5", "--guidance_interval", "1,3", "--no-use_dp"]
    options += ["--block_sizes", "8", "16", "--compilation_cache", "gs://b/c", "--chip_rows", "2"]
    options += ["--sparse_attention", "m.json", "--dense_steps", "0.5"]
    words = parse([*FILE, *options], has_images=False).words
    here = Path.cwd()
    shared = ["--dtype=bfloat16", f"--model_id={TINY_MODEL}"]
    bucket = "--compilation_cache=gs://b/c"
    of_stage = {
        "stage1": [*shared, "--negative_prompt=--dog"],
        "stage2": [*shared, bucket, "--height=64", "--preset=authors", f"--lora={here}/a.safetensors:-0.5"],
        "stage3": [*shared, bucket, f"--output_frames={here}/f.safetensors", "--chip_rows=2"],
    }
    of_stage["stage2"] += ["--guidance_interval=1,3", "--no-use_dp", "--block_sizes", "8", "16"]
    of_stage["stage2"] += [f"--sparse_attention={here}/m.json", "--dense_steps=0.5"]
    for stage, expected in of_stage.items():
        own = {*words[stage]} - {"--quiet", "--no-warmup", "--warmup_steps", "0"}
        own -= {"--prompt_file", str(here / "prompts.txt"), "--output_dir", "--input_dir", str(here / "stage_outputs")}
        assert own == {*expected}, stage
    assert "--height=64" in parse([*FILE, *options], has_images=True).words["stage1"]  # the size of the images


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_not_for_many(name, capsys):
    switches = {"dump_stats", "dump_shards", "verbose", "restart"}
    values = {"process_id": ["0"], "num_processes": ["2"], "strength": ["0.5"], "output_video": ["a.mp4"]}
    with pytest.raises(SystemExit, match="2"):
        parse([*FILE, f"--{name}", *([] if name in switches else values.get(name, ["x"]))])
    error = capsys.readouterr().err
    assert f"--{name} is not for a fleet: {REFUSED[name]}" in error and error.count("\n") == 1, error


def test_without_ray(monkeypatch, tmp_path):
    """What is missing is said before anything is read, and nothing else needs it."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find(name))
    with pytest.raises(Exception, match=r"package ray is not installed .* -m pip install -r fleet/requirements.txt"):
        main([*FILE, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def node(name: str, alive: bool = True, labels: dict[str, str] | None = None, **resources: float) -> dict:
    """Return a machine as `ray.nodes` does."""
    about = {"NodeManagerHostname": name, "NodeManagerAddress": f"address of {name}", "Labels": labels or {}}
    return about | {"NodeID": f"id of {name}", "Alive": alive, "Resources": {"CPU": 8.0} | resources}


def of_slice(name: str, number: int, topology: str) -> dict:
    labels = {"ray.io/tpu-slice-name": "s", "ray.io/tpu-worker-id": str(number), "ray.io/tpu-topology": topology}
    return node(name, labels=labels, TPU=4.0, **{"TPU-v6e-8-head": 1.0} if number == 0 else {})


@pytest.mark.parametrize(
    ("nodes", "chips", "expected"),
    [
        ([node("a", TPU=8.0), node("b", TPU=8.0, alive=False), node("c")], None, [("a", "TPU", 8)]),
        ([node("a", TPU=8.0)], 4, [("a", "TPU", 4), ("a", "TPU", 4)]),
        ([node("a", GPU=4.0)], 1, [("a", "GPU", 1)] * 4),
        ([node("a", GPU=1.0)], 2, [("a", "GPU", 1)]),
        ([node("a", **{ON_CPU: 1.0}), node("b", GPU=2.0)], None, [("a", ON_CPU, 1), ("b", "GPU", 2)]),
        ([of_slice("b", 1, "2x4"), of_slice("a", 0, "2x4")], None, [("a b", "TPU", 4)]),
        ([of_slice("a", 0, "2x4")], None, []),  # one host of two
        ([of_slice("a", 0, "2x2")], None, [("a", "TPU", 4)]),
        ([of_slice("b", 1, "2x4"), of_slice("a", 0, "2x4")], 4, [("a", "TPU", 4), ("b", "TPU", 4)]),
    ],
)
def test_places(nodes, chips, expected):
    there = [*places(nodes, chips)]
    assert [(" ".join(one.name for one in place.nodes), place.kind, place.chips) for place in there] == expected
    assert len(set(there)) == len(there)


@pytest.mark.slow
def test_what_counts_as_made(tmp_path):
    """Files of the plain commands do, if all options are the same; what has changed says from which stage on not."""
    outputs, file = tmp_path / "outputs", tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\n")
    given = ("--negative_prompt", "dog")
    check(
        run_here(STAGE1, "--prompt_file", file, "--model_id", TINY_MODEL, "--output_dir", outputs, *given, folder=ROOT)
    )
    check(run_here(STAGE2, "--input_dir", outputs, *SIZE, "--num_videos_per_prompt", 2, folder=ROOT))
    check(run_here(STAGE3, "--input_dir", outputs, folder=ROOT))

    def states(*options: object, of: Path = outputs, **changed: object) -> str:
        defaults = {"negative_prompt": "dog", "num_videos_per_prompt": 2} | dict(
            zip([name[2:] for name in SIZE[::2]], SIZE[1::2], strict=True)
        )
        words = itertools.chain(*((f"--{name}", str(value)) for name, value in (defaults | changed).items()))
        whole = ["--prompt_file", str(file), "--model_id", str(TINY_MODEL), "--output_dir", str(of)]
        command = parse([*whole, *words, *map(str, options)], has_images=False)
        model_id = checkpoint.resolve_model_id(str(TINY_MODEL))
        return "".join(
            str(state.value) for state in found.states(prompts.read_prompts(file, of, None), command, model_id)
        )

    entries = [*found.entries(prompts.read_prompts(file, outputs, None))]
    assert [(entry.seed, entry.state) for entry in entries] == [(42, "decoded"), (43, "decoded")] * 2
    made, encoded, nothing = (str(state.value) for state in (State.MADE, State.ENCODED, State.NOTHING))
    assert states() == states("--videos_at_once", 1, "--quiet", "--group", 3) == made * 2
    for changed in (("seed", 1), ("num_inference_steps", 3), ("scheduler", "dpm"), ("fps", 9), ("frames", 13)):
        assert states(**dict([changed])) == encoded * 2, changed
    assert states("--decoder", "flax") == states("--allow_nan") == encoded * 2
    assert states(negative_prompt="cat") == states("--dtype", "bfloat16") == nothing * 2
    assert states(num_videos_per_prompt=1) == states(num_videos_per_prompt=3) == encoded * 2
    text = file.read_text()
    file.write_text(json.dumps({"prompt": "a red circle", "seed": 5}) + '\n{"prompt": "a blue square"}\n')
    assert states() == nothing + made
    file.write_text("a red circle\na green square\n")
    assert states() == made + nothing
    file.write_text(text)

    for change, expected in (
        (lambda folder: (folder / "prompt_0001" / "seed_42" / VIDEO).unlink(), encoded + made),
        (lambda folder: edit_latents(folder / "prompt_0002" / "seed_43", lambda x: x + 1), made + encoded),
        (lambda folder: edit_config(folder / "prompt_0001", prompt="another"), nothing + made),
        (lambda folder: (folder / "prompt_0002" / "seed_43" / LATENTS).write_bytes(b"broken"), made + encoded),
    ):
        folder = shutil.copytree(outputs, tmp_path / "copy")
        assert states(of=folder) == made * 2
        change(folder)
        assert states(of=folder) == expected
        shutil.rmtree(folder)


@pytest.fixture
def worker(monkeypatch) -> Worker:
    """Return what runs stages in this process, which keeps its handlers of signals and nothing of the stages."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(warm._Kept, "of_name", None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return Worker("1")


@pytest.mark.parametrize(
    ("raised", "end", "error"),
    [
        (None, "made", ""),
        (UserError("the line"), "failed", "the line"),
        (writing.InUse("a is in use"), "busy", "a is in use"),
        (OSError(errno.ENOSPC, "No space left on device", "a"), "full", "a: No space left on device; free some"),
        (SystemExit(2), "failed", "of argparse"),
        (KeyboardInterrupt("after step 3"), "interrupted", "after step 3"),
        (ZeroDivisionError("a bug"), "broken", "ZeroDivisionError: a bug"),
        (MemoryError(), "failed", "this machine's memory is too small"),
    ],
)
def test_how_a_stage_ends(raised, end, error, worker, monkeypatch):
    def main(words):
        print("  WARNING: look")
        print("fleet: error: of argparse", file=sys.stderr)
        if raised:
            raise raised

    monkeypatch.setitem(sys.modules, "stage", SimpleNamespace(main=main))
    outcome = worker.run("stage", ["--quiet"])
    assert (outcome.end, outcome.warnings) == (end, ("look",)) and error in outcome.error, outcome
    assert bool(outcome.trace) == (end == "broken")


def test_how_a_stage_of_several_processes_ends(worker, tmp_path):
    outcome = worker.run_with_others("stage2_transformer", ["--input_dir", str(tmp_path), "--quiet"])
    assert outcome.end == "failed" and "generation_config.json does not exist" in outcome.error, outcome
    for error, end in (("/a is in use by stage2", "busy"), ("cannot write a: File too large", "full")):
        assert of_message(error) == end


def test_what_stays_warm(monkeypatch):
    """One thing of each name stays, as long as it is asked for with the same; without `keep` nothing does."""
    monkeypatch.setattr(warm._Kept, "of_name", None)
    made = itertools.count()
    assert [warm.kept("a", 1, lambda: next(made)) for _ in range(2)] == [0, 1]
    warm.keep()
    assert [warm.kept(*what, lambda: next(made)) for what in (("a", 1), ("a", 1), ("b", 1), ("a", 2))] == [2, 2, 3, 4]
    warm.let_go("a", "c")
    assert [warm.kept(*what, lambda: next(made)) for what in (("b", 1), ("a", 2))] == [3, 5]


@pytest.mark.parametrize(("in_use", "stays"), [(10, True), (11, False), (None, True)])
def test_room_for_another_stage(in_use, stays, monkeypatch):
    """What is kept of other stages goes if a program does not fit beside it; a CPU does not say how much it has."""
    monkeypatch.setattr(warm._Kept, "of_name", {"transformer": (0, "weights"), "vae": (0, "weights")})
    sizes = {"argument_size_in_bytes": 4, "temp_size_in_bytes": 5, "output_size_in_bytes": 1}
    program = SimpleNamespace(memory_analysis=lambda: SimpleNamespace(**sizes))
    memory = None if in_use is None else {"bytes_in_use": in_use, "bytes_limit": 20}
    warm.make_room([program], [SimpleNamespace(memory_stats=lambda: memory)], others=["transformer"])
    assert set(warm._Kept.of_name) == ({"transformer", "vae"} if stays else {"vae"})
