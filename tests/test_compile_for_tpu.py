"""The compile tool on the TPU compiler itself, and executables made ahead of time.

The tool and the stages run in the tests' process, on one device; the compiler has a process of its own, as always.
"""

import functools
import json
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import stage2_transformer
import stage3_vae_decoder
from benchmarks import reproduce_tables
from cogvideox.errors import UserError
from cogvideox.run import executable
from cogvideox.run.executable import operations_digest
from compile_for_tpu import __main__ as tool
from compile_for_tpu import prediction, programs, report, topologies
from tests.helpers import LATENTS, QUICK_COMPILATION, ROOT, SIZE, needs_libtpu, values

TINY_STEP = [*SIZE[:-2], "--dtype", "float32"]


@pytest.fixture
def run(one_device, monkeypatch, capsys):
    """Run a program's main, and return what it prints; for the compiler's process, too, this machine has one device."""
    monkeypatch.setenv("XLA_FLAGS", QUICK_COMPILATION)

    def run(main, *arguments) -> str:
        capsys.readouterr()
        main([*map(str, arguments)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def compile_for(run, tmp_path):
    """Run the compile tool, and return what it prints and its report."""

    def compile_(*arguments) -> tuple[str, dict]:
        printed = run(tool.main, *arguments, "--output", "report.json")
        return printed, json.loads((tmp_path / "report.json").read_text())

    return compile_


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(("attention", "least", "most"), [("splash", 290, 310), ("splash_exp2", 700, 819)])
def test_kernel(compile_for, attention, least, most):
    """JAX's kernel with segments (without them the design figure is 320), and ours, whose limit is the MXU's 819."""
    options = ("--topology", "v6e-1", "--attention", attention, "--tokens", 25826, "--heads", 6)
    _, report = compile_for("kernel", *options)
    (kernel,) = report["kernels"].values()
    assert least < kernel["useful_scores_per_cycle"] < most, kernel
    if attention == "splash_exp2":
        # P^T waits in VMEM for its product, which the compiler counts as spills; the MXU's work must hide them.
        assert max(kernel["units"]["VSTORE:SPILL"], kernel["units"]["VLOAD:FILL"]) <= 0.2, kernel
        assert kernel["units"]["MXU"] >= 0.9, kernel
    assert report["predicted_seconds"] == pytest.approx(sum(report["split"].values()))


@pytest.mark.slow
@needs_libtpu
def test_kernel_of_one_grid_step(run_stage, tmp_path):
    """The compiler makes no loop of it. The tool runs as people run it."""
    options = ("--topology", "v6e-1", "--tokens", 200, "--heads", 1)
    run_stage("compile_for_tpu", "kernel", *options, "--output", "report.json")
    (kernel,) = json.loads((tmp_path / "report.json").read_text())["kernels"].values()
    assert 0 < kernel["cycles"] < 1e5, kernel


@pytest.mark.slow
@needs_libtpu
def test_kernel_of_a_pattern(compile_for):
    """Three of its frames of 1,024 tokens see 2, 3 and 2 frames: the kernel's loop over them has no fixed length."""
    options = ("--topology", "v6e-1", "--tokens", 3 * 1000 + 226, "--token_frames", 3, "--heads", 1)
    _, report = compile_for("kernel", *options, "--pattern", "frames:1", "--block_sizes", 512, 512)
    kernel = report["kernels"]["exp2_splash_frames.1"]
    density = (226 * 3226 + (2 + 3 + 2) * 1000**2 + 3000 * 226) / 3226**2
    assert float(report["options"]["density"]) == pytest.approx(density, abs=1e-4)
    assert kernel["useful_scores_per_cycle"] * kernel["cycles"] == pytest.approx(density * 3226**2)
    products = (7 * 1024**2 + (3 * 1024 + 256) * 256 + 3 * 1024 * 256) / 256**2
    assert 1 < kernel["cycles"] / (80 * products) < 2, kernel  # its passes are short


@pytest.mark.slow
@needs_libtpu
def test_stage2_of_the_tiny_model(compile_for, random_model):
    """All parts of a step: the loop over two blocks, collectives, the kernel; the parts make the whole."""
    printed, report = compile_for("stage2", "--topology", "v6e-4", "--model_id", random_model, *SIZE)
    assert report["predicted_seconds"] == pytest.approx(sum(report["split"].values()))
    assert all(report["split"][part] > 0 for part in ("Pallas kernels", "matrix products", "collectives"))
    assert report["memory"]["fits"] and report["memory"]["limit"] == 31.25
    assert "fits" in printed and "predicted" in printed
    assert report["model"] == random_model.name and random_model.name in printed.splitlines()[0]
    assert sum(report["slowest"].values()) <= report["predicted_seconds"] * (1 + 1e-9)


@pytest.mark.slow
@needs_libtpu
def test_out_of_memory_is_one_line(compile_for, random_model, tmp_path, capsys):
    size = ("--height", 480, "--width", 480, "--frames", 321)
    with pytest.raises(SystemExit) as end:
        compile_for("stage2", "--topology", "v6e-1", "--model_id", random_model, "--attention", "xla", *size)
    assert end.value.code == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "does not fit" in line)
    assert "GiB" in line and "--attention splash" in line, line
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["memory"]["peak"] > report["memory"]["limit"]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stage2", "--topology", "v9-8"], ["v9-8", "v6e-8"]),
        (["stage2", "--topology", "v6e-8", "--sp_num", 3], ["--sp_num 3", "[1, 2, 4]"]),
        (["stage2", "--topology", "v6e-1", "--height", 100], ["--height 100", "multiple of 16"]),
        (["kernel", "--block_sizes", 1], ["--block_sizes"]),
        (["kernel", "--pattern", "frames"], ["--pattern", "frames:1"]),
        (["kernel", "--pattern", "frames:1", "--tokens", 1000], ["--tokens 1000", "11 frames"]),
        (["stage4"], ["stage4"]),
    ],
)
def test_bad_input(compile_for, arguments, words, capsys):
    with pytest.raises((UserError, SystemExit)) as error:
        compile_for(*arguments)
    message = str(error.value) if error.type is UserError else capsys.readouterr().err
    assert all(word in message for word in words) and len(message.splitlines()) == 1, message


@pytest.mark.slow
@needs_libtpu
def test_executable_round_trip(compile_for, run, outputs, random_model, tmp_path):
    """Compiled ahead for this machine's CPU: the stage takes it and gives the same latents; others it refuses."""
    step = ["stage2", "--model_id", random_model, *TINY_STEP]
    compile_for(*step, "--topology", "cpu", "--save", "cpu.bin")
    compile_for(*step, "--topology", "v6e-1", "--attention", "xla", "--save", "tpu.bin")
    before = values(outputs / LATENTS)

    stage2 = functools.partial(run, stage2_transformer.main, "--input_dir", outputs, *SIZE, "--executable")
    assert "loaded the denoising step" in stage2("cpu.bin")
    assert values(outputs / LATENTS) == before
    for file, options, reason in (
        ("tpu.bin", [], "1 x TPU v6 lite, not 1 x cpu"),
        ("cpu.bin", ["--frames", 17], "argument shapes"),
    ):
        printed = stage2(file, *options)
        (warning,) = (line for line in printed.splitlines() if "WARNING" in line)
        assert reason in warning, warning
        assert "compiled the denoising step" in printed or "loaded the compiled denoising" in printed

    (tmp_path / "broken.bin").write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match=r"broken\.bin"):
        stage2("broken.bin")


@pytest.mark.slow
def test_executable_of_another_config(compile_for, run, outputs, random_model, tmp_path):
    """A number in the model's config that changes no shape makes another program."""
    other = Path(shutil.copytree(random_model, tmp_path / "other_norms"))
    path = other / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"norm_eps": 10 * config["norm_eps"]}))
    compile_for("stage2", "--model_id", other, *TINY_STEP, "--topology", "cpu", "--save", "other.bin")
    printed = run(stage2_transformer.main, "--input_dir", outputs, *SIZE, "--executable", "other.bin")
    (warning,) = (line for line in printed.splitlines() if "WARNING" in line)
    assert warning.endswith("it was made for other operations"), warning
    assert "compiled the denoising step" in printed or "loaded the compiled denoising step" in printed


def test_an_executable_is_for_all_maps_of_its_kinds_of_patterns(random_model):
    def description(made_up):
        step = ["stage2", "--topology", "cpu", "--model_id", str(random_model), *map(str, TINY_STEP)]
        found = programs.trace_stage2(tool.parse_arguments([*step, "--sparse_attention", made_up]), jax.devices()[:1])
        return executable.description(found.name, found.devices, found.traced, found.executable_options)

    one, same, other = map(description, ("0.5*frames:1", "0.25*frames:0+0.5*frames:1", "0.5*positions:1"))
    assert one == same
    assert [name for name in one if one[name] != other[name]] == ["options"]


def test_digest_sees_numbers_and_constants():
    def digest(number, table):
        function = jax.jit(lambda x: jax.lax.map(lambda y: y * number + jnp.asarray(table), x))
        return operations_digest([function.trace(jax.ShapeDtypeStruct((2, 3), jnp.float32))])

    table = np.arange(3, dtype=np.float32)
    assert digest(2.0, table) == digest(2.0, table.copy())
    assert len({digest(2.0, table), digest(3.0, table), digest(2.0, table + 1)}) == 3


def test_trees_of_an_executable_are_those_of_this_run(tmp_path):
    """The file has none: keyword arguments and names of results come from what the stage itself has traced."""
    new = time.time()  # compiled, not found in the cache: what jax has loaded from there it cannot always serialize
    traced = [
        jax.jit(lambda named, x, *, y: {"sum": named["a"] + x + y, "new": x * new}).trace({"a": 1.0}, 2.0, y=3.0),
        jax.jit(lambda x: (x - new, [x])).trace(np.arange(3.0)),
    ]
    executable.save(str(tmp_path / "saved"), [program.lower().compile() for program in traced], {})
    first, second = executable.load(tmp_path / "saved", {}, jax.devices()[:1], traced)
    assert first({"a": 1.0}, 2.0, y=3.0)["sum"] == 6 and second(np.arange(3.0))[1][0].tolist() == [0, 1, 2]


@pytest.mark.slow
def test_encoder(compile_for, random_model):
    """Of a video in three chunks, the first of which is longer."""
    size = ("--height", 32, "--width", 48, "--frames", 25)
    _, found = compile_for("encoder", "--model_id", random_model, *size, "--topology", "cpu")
    assert found["options"]["frames"] == "25" and found["memory"]["fits"] and found["flops"] > 0


@pytest.mark.slow
def test_decoder_round_trip(compile_for, run, outputs, random_model):
    """The same for stage 3, and programs for another split."""
    size = ("--height", 32, "--width", 48, "--frames", 9, "--dtype", "float32")
    compile_for("stage3", "--model_id", random_model, *size, "--topology", "cpu", "--save", "decoder.bin")
    stage3 = functools.partial(run, stage3_vae_decoder.main, "--input_dir", outputs, "--executable", "decoder.bin")
    assert "loaded the torchax decoder" in stage3()
    assert "made for other options" in stage3("--strips", 2)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("stage2", "stage2-v6e-8-768x1360x81-guided.json"),
        (
            "stage2 --topology v6e-1 --height 640 --width 1280 --frames 61 --guidance_scale 1 --num_inference_steps 50",
            "stage2-v6e-1-640x1280x61.json",
        ),
        (
            "stage2 --sp_num 2 --no-use_dp --block_sizes 256 512 --save step.bin",
            "stage2-v6e-8-768x1360x81-guided-use_dp=False-sp_num=2-block_sizes=256,512.json",
        ),
        ("stage2 --model_id zai-org/CogVideoX-5b", "stage2-v6e-8-480x720x49-guided-model=CogVideoX-5b.json"),
        ("stage2 --model cogvideox-5b", "stage2-v6e-8-480x720x49-guided-model=CogVideoX-5B.json"),
        ("stage3 --model CogVideoX-2B", "stage3-v6e-8-480x720x49-model=CogVideoX-2B.json"),
        ("stage2 --model_id zai-org/CogVideoX1.5-5B", "stage2-v6e-8-768x1360x81-guided-model=CogVideoX1.5-5B.json"),
        (f"stage2 --model_id {programs.BUILT_IN_MODEL}/", "stage2-v6e-8-768x1360x81-guided.json"),
        (
            "stage2 --preset authors",
            "stage2-v6e-8-768x1360x81-guided-use_dynamic_cfg=True-scheduler=dpm.json",
        ),
        ("stage3", "stage3-v6e-8-768x1360x81.json"),
        ("stage3 --decoder flax --strips 4", "stage3-v6e-8-768x1360x81-flax-strips=4.json"),
        ("kernel --topology v6e-1", "kernel-v6e-1-25826.json"),
        ("kernel --tokens 45106 --attention splash", "kernel-v6e-8-45106-attention=splash.json"),
        ("kernel --tokens 45106 --pattern frames:1", "kernel-v6e-8-45106-frames1.json"),
    ],
)
def test_names_of_reports(command, name):
    arguments = tool.parse_arguments(command.split())
    labels = programs.labels(arguments, tool.parse_arguments([arguments.what]))
    assert report.file_name(arguments.what, arguments.topology, labels) == name


def test_reports_in_the_repository_can_be_printed():
    saved = [path for path in report.RESULTS.glob("*.json") if path.name.startswith(("stage", "kernel"))]
    assert saved
    for path in saved:
        found = json.loads(path.read_text())
        lines = report.text(found).splitlines()
        assert ("CogVideoX" in lines[0]) == (found["what"] != "kernel"), lines[0]
        said = f"{found['predicted_seconds']:.4g} s" if "predicted_seconds" in found else found["unpredicted"]
        assert any(said in line for line in lines if "predicted " in line)


def test_a_kernel_that_needs_too_much_vmem_is_one_line():
    """As the compiler says it for v4; a step that does not fit the memory of a chip is another error."""
    words = "RESOURCE_EXHAUSTED: Ran out of memory in memory space {0}. Used 29.78{1} of 16.00{1} {0}. Exceeded"
    with pytest.raises(
        UserError, match=r"29.78 MiB of VMEM, and a core of this TPU has 16.00 MiB; use --attention splash"
    ):
        prediction.out_of_memory(words.format("vmem", "M"), "")
    assert not prediction.out_of_memory(words.format("hbm", "G"), "")["fits"]


def test_a_schedule_that_cannot_be_read_leaves_the_memory():
    found = json.loads((report.RESULTS / "kernel-v6e-1-25826.json").read_text())
    del found["predicted_seconds"]
    lines = report.text(found | {"unpredicted": "norm: a region is not there"}).splitlines()
    assert "fits" in lines[2] and lines[-1].endswith("cannot be read: norm: a region is not there")


def test_trust_is_the_range_of_what_was_measured():
    """Of steps and of kernels, whose rate was measured instead of the seconds; every report has the sentence."""
    steps = [row["measured"] / row["predicted_seconds"] for row in json.loads(report.TABLES.read_text()).values()]
    kernels = json.loads(report.MEASURED_KERNELS.read_text()).values()
    ratios = [*steps, *(row["predicted"] / row["measured"] for row in kernels)]
    assert report.times_predicted() == pytest.approx(ratios)
    words = report.trust().split()
    assert [float(words[1]), float(words[3])] == [round(min(ratios), 2), round(max(ratios), 2)]
    assert max(steps) < 1 < min(ratios[len(steps) :]), (
        "whole steps are at the lower end no more, or kernels at the upper"
    )
    for name in ("kernel-v6e-1-25826.json", "stage3-v6e-8-768x1360x81.json"):
        assert " ".join(words) in " ".join(report.text(json.loads((report.RESULTS / name).read_text())).split())


def test_reports_are_published_on_demand_alone(tmp_path, monkeypatch, capsys):
    """Otherwise they go to a folder that git ignores."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(topologies, "check", lambda topology: None)
    found = json.loads((ROOT / "benchmarks/results/kernel-v6e-1-25826.json").read_text())
    monkeypatch.setattr(tool.compiler, "in_a_process", lambda *_: found)
    for options, folder in (([], "reports"), (["--publish"], "results")):
        tool.main(["kernel", "--topology", "v6e-1", *options])
        assert json.loads((tmp_path / folder / "kernel-v6e-1-25826.json").read_text()) == found
        assert f"wrote {folder}/kernel-v6e-1-25826.json" in capsys.readouterr().out
    assert f"/{report.REPORTS}/" in (ROOT / ".gitignore").read_text().splitlines()
    with pytest.raises(SystemExit):
        tool.main(["kernel", "--publish", "--output", "report.json"])


@pytest.mark.parametrize(("main", "command"), [(tool.main, "stage2 --topology v6e-1"), (reproduce_tables.main, "")])
def test_without_libtpu(main, command, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"libtpu.*is not installed"):
        main(command.split())
    topologies.check("cpu")
