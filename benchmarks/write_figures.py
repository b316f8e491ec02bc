"""Write the figures of README and docs from the reports in benchmarks/results/, and the list of the package's files.

    python -m benchmarks.write_figures
    python -m benchmarks.write_figures --check

A figure stands between two comments that a reader of the page does not see. The first one says where it comes from:

    <!-- figure: stage2-v6e-1-640x1280x61.json predicted_seconds .2f -->1.32<!-- / --> s

that is a file, an entry of it (with / between the names) and a Python format; or a key of FIGURES below, for what is
computed from several entries. Whole tables stand between comments too, named by a key of TABLES:

    <!-- table: steps -->
    | ... |
    <!-- / -->

What was measured by others and is in none of the files is in the tables here, with its source on the page. The list of
files in docs/architecture.md is made of the first sentences of the modules.
"""

import ast
import difflib
import functools
import itertools
import json
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import reports, reproduce_tables
from benchmarks.reports import HOSTS, LARGE, MIDDLE, MODEL, SMALL, V6E
from cogvideox.cli.parser import ArgumentParser
from cogvideox.cli.program import run
from cogvideox.errors import UserError
from cogvideox.features import features_of
from cogvideox.files import generation_defaults, published, writing
from compile_for_tpu import programs, report

ROOT = Path(__file__).resolve().parent.parent
INLINE = re.compile(r"(<!-- figure: (.+?) -->)(.*?)(<!-- / -->)")
BLOCK = re.compile(r"(<!-- table: (.+?) -->\n)(.*?)(^<!-- / -->$)", re.MULTILINE | re.DOTALL)
SEVEN_X = "stage2-7x-4-768x1360x81-guided.json"
GUIDED = "stage2-v6e-8-768x1360x81-guided.json"  # the step of the default video
HEADS = 48  # of CogVideoX1.5-5B
CHIP_HOUR = 2.70  # dollars of a v6e chip on demand, by Google's price list in 2026; docs/tpu-vm.md says to check it


def pages() -> list[Path]:
    """Return the pages that may have figures."""
    return [path for folder in (".", "docs", "tiny_model*") for path in sorted(ROOT.glob(f"{folder}/*.md"))]


def with_figures(text: str) -> str:
    """Return the text of a page with all of its figures written anew.

    Raises:
        UserError: a figure comes from a file or an entry that is not there, or has an unknown name.
    """
    text = INLINE.sub(lambda match: f"{match[1]}{figure(match[2])}{match[4]}", text)
    return BLOCK.sub(lambda match: f"{match[1]}{known(TABLES, match[2])()}\n{match[4]}", text)


def figure(source: str) -> str:
    """Return a figure by what its first comment says after "figure: "."""
    if not (match := re.fullmatch(r"(\S+\.json) (.+) (\S+)", source)):
        return known(FIGURES, source)()
    value = result(match[1])
    try:
        for name in match[2].split("/"):
            value = value[name]
        return format(value, match[3])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{match[1]} has no entry {match[2]} that can be written as {match[3]}") from error


def known(functions: Mapping[str, Callable[[], str]], name: str) -> Callable[[], str]:
    """Return the function of a figure or table."""
    if name not in functions:
        raise UserError(f"no figure is called '{name}'; benchmarks/write_figures.py has those that are")
    return functions[name]


@functools.cache
def result(name: str) -> dict:
    """Read a file of results."""
    path = report.RESULTS / name
    if not path.is_file():
        raise UserError(f"{path.relative_to(ROOT)} is not there")
    return json.loads(path.read_text())


def table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows))


def size_text(size: Sequence[int]) -> str:
    """Return a size as pages name it, such as "768 x 1360 x 81"."""
    return " x ".join(map(str, size))


# --- Our predictions ---------------------------------------------------------------------------------------------


def step(topology: str, size: tuple[int, int, int], guided: bool, model: str = MODEL) -> dict:
    """Return the report of a model's step."""
    return result(reports.step_file(topology, size, guided, model))


def decode(topology: str, size: tuple[int, int, int]) -> dict:
    """Return the report of a decode."""
    return result(report.file_name("stage3", topology, ["x".join(map(str, size))]))


def seconds(found: Mapping, digits: int = 2) -> str:
    """Return the predicted seconds of a report as a cell of a table."""
    return f"{found['predicted_seconds']:.{digits}f} s"


def gib(found: Mapping) -> str:
    """Return the memory of a chip in a report as a cell of a table."""
    return f"{found['memory']['peak']:.1f} GiB"


def kernel(name: str) -> dict:
    """Return the entry of the attention kernel in a report."""
    return next(entry for label, entry in result(name)["kernels"].items() if label.startswith("exp2_splash."))


def attention_seconds(name: str) -> float:
    """Return the seconds that attention takes of a step, of all groups of heads."""
    return sum(seconds for label, seconds in result(name)["slowest"].items() if "(exp2_splash." in label)


def memory() -> str:
    """Return the memory that the compiler allots on a chip."""
    rows = []
    for size, guided in itertools.product((SMALL, MIDDLE, LARGE), (False, True)):
        if (size, guided) != (MIDDLE, False):
            cells = (gib(step(topology, size, guided)) for topology in V6E)
            rows.append([f"stage 2, {size_text(size)}, {'guidance' if guided else 'no guidance'}", *cells])
    for size in (SMALL, LARGE):
        rows.append([f"stage 3, {size_text(size)}", *(gib(decode(topology, size)) for topology in V6E)])
    return table(["", *V6E], rows)


def decoder() -> str:
    """Return the seconds of a decode; those of the original project are from its description."""
    measured = {LARGE: "see below", MIDDLE: "0.86 s (TorchAx)", SMALL: "see below"}
    rows = [[size_text(size), measured[size], seconds(decode("v6e-8", size))] for size in (LARGE, MIDDLE, SMALL)]
    return table(["on v6e-8", "original project, measured", "ours, predicted"], rows)


def several_hosts() -> str:
    """Return how a guided step of the default video grows faster with the slice."""
    slices = ("v6e-8", *HOSTS)
    names = [report.file_name("stage2", topology, ["768x1360x81", "guided"]) for topology in slices]
    meshes = [[int(n) for n in re.findall(r"\d+", result(name)["options"]["mesh"])] for name in names]
    steps = [result(name)["predicted_seconds"] for name in names]
    decodes = [decode(topology, LARGE) for topology in slices]
    rows = [
        ["mesh (dp x sp x tp)", *(" x ".join(map(str, mesh)) for mesh in meshes)],
        ["heads of a chip in attention", *(str(HEADS // (sp * tp)) for _, sp, tp in meshes)],
        ["a step", *(f"{value:.3f} s" for value in steps)],
        ["of it: attention kernel", *(f"{attention_seconds(name):.3f} s" for name in names)],
        ["of it: collectives", *(f"{result(name)['split']['collectives']:.3f} s" for name in names)],
        ["faster than v6e-8", *("1" if value == steps[0] else f"{steps[0] / value:.2f} x" for value in steps)],
        ["memory of a chip", *(gib(result(name)) for name in names)],
        ["stage 3, all frames", *map(seconds, decodes)],
        ["memory of a chip", *map(gib, decodes)],
    ]
    return table(["", *slices], rows)


def share_of_statistics() -> str:
    """Return by how much of its time statistics make the guided step of the default video longer."""
    with_them = with_option("dump_stats=True")["predicted_seconds"]
    return f"{with_them / result(GUIDED)['predicted_seconds'] - 1:.0%}"


# What TeaCache's authors report for CogVideoX1.5: its factor for 50 steps on an H100, by --cache_threshold.
TEACACHE = {"0.1": 1.3, "0.2": 1.8, "0.3": 2.1}


def with_option(option: str) -> dict:
    """Return the report of the guided step of the default video with an option, as its file is called."""
    return result(GUIDED.replace(".json", f"-{option}.json"))


def saved_steps(count: int = 50) -> str:
    """Return the seconds of 50 steps with the options that save some."""
    full, skipped = (with_option(f"{name}cache_schedule=1") for name in ("", "skipped_step=True-"))
    full, skipped = full["predicted_seconds"], skipped["predicted_seconds"]
    rows = [["no cache", "1", "0", f"{count * result(GUIDED)['predicted_seconds']:.1f}"]]
    for threshold, factor in TEACACHE.items():
        fewer = round(count * (1 - 1 / factor))
        total = (count - fewer) * full + fewer * skipped
        rows.append([f"`--cache_threshold {threshold}`", f"{factor}", f"{fewer}", f"{total:.1f}"])
    guided, alone = with_option("guidance_interval=0,4"), step("v6e-8", LARGE, guided=False)
    total = count / 2 * (guided["predicted_seconds"] + alone["predicted_seconds"])
    label = f"`--guidance_interval 0,24` ({seconds(guided, 3)} with guidance, {seconds(alone, 3)} without)"
    rows.append([label, "", "", f"{total:.1f}"])
    return table(["50 steps", "TeaCache's factor", "steps skipped, from the factor", "seconds, predicted"], rows)


def sparse_steps() -> str:
    """Return the steps whose heads have patterns, beside dense ones on the same chips."""
    rows = []
    for slice_, maps in reports.SPARSE_STEPS.items():
        name, dense = reports.step_file(slice_, LARGE, guided=True), step(slice_, LARGE, guided=True)
        of_maps = {f"`{one}`": name.replace(".json", f"-sparse_attention={programs.label(one)}.json") for one in maps}
        for which, found in {"no map": dense, **{one: result(file) for one, file in of_maps.items()}}.items():
            share, ratio = found["options"].get("density", "1"), found["predicted_seconds"] / dense["predicted_seconds"]
            memory = f"{found['memory']['peak']:.1f} GiB"
            rows.append([slice_, which, share, f"{found['predicted_seconds']:.3f} s", f"{ratio:.2f}", memory])
    heading = ["slice", "share of the heads * pattern; the others are dense", "scores", "a step, predicted"]
    return table([*heading, "beside no map", "memory of a chip"], rows)


def groups() -> str:
    """Return the steps on slices where sp does not divide the heads, so that its chips share them in groups."""
    rows = []
    for found in (result(path.name) for path in sorted(report.RESULTS.glob("stage2-*.json"))):
        options = found["options"]
        if "query_parts" not in options:
            continue
        dp, sp, tp = map(int, re.findall(r"\d+", options["mesh"]))
        parts = int(options["query_parts"])
        size = size_text(tuple(int(options[side]) for side in ("height", "width", "frames")))
        scores = next(entry for label, entry in found["kernels"].items() if label.startswith("exp2_splash."))
        rows.append(
            [
                f"{found['model']}, {size}, {'guidance' if options['guided'] == 'True' else 'no guidance'}",
                found["topology"],
                f"{dp} x {sp} x {tp}",
                f"{parts} of {sp // parts}",
                f"{found['predicted_seconds']:.3f} s",
                f"{found['split']['collectives']:.3f} s",
                f"{scores['useful_scores_per_cycle']:.0f}",
            ]
        )
    heading = ["", "slice", "mesh (dp x sp x tp)", "groups of chips", "a step", "of it: collectives"]
    return table([*heading, "useful scores a cycle"], rows)


def other_tpus() -> str:
    """Return memory and seconds of the guided step of the default video on TPUs other than v6e."""
    rows = []
    for topology in reports.OTHER_TPUS:
        found = step(topology, LARGE, guided=True)
        fits = f"{gib(found)} of {found['memory']['limit']:.1f}"
        rate = f"{kernel(reports.step_file(topology, LARGE, guided=True))['useful_scores_per_cycle']:.0f}"
        rows.append([topology, fits, seconds(found), rate])
    return table(
        ["slice", "memory of a chip (on v4 and 7x, a core)", "a step, predicted", "useful scores a cycle"], rows
    )


def seven_x() -> str:
    """Return steps of the default video on 7x beside v6e-8."""
    slices = ("v6e-8", "7x-4", "7x-8")
    guided, alone = ([step(topology, LARGE, choice) for topology in slices] for choice in (True, False))
    names = [reports.step_file(topology, LARGE, guided=True) for topology in slices]
    rates = [kernel(name) for name in names]
    rows = [
        ["devices (on 7x two a chip)", "8", "8", "16"],
        ["mesh (dp x sp x tp)", *(" x ".join(re.findall(r"\d+", found["options"]["mesh"])) for found in guided)],
        ["a step, guidance", *(seconds(found, 3) for found in guided)],
        ["of it: attention kernel", *(f"{attention_seconds(name):.3f} s" for name in names)],
        ["of it: collectives", *(f"{found['split']['collectives']:.3f} s" for found in guided)],
        ["useful scores a cycle", *(f"{rate['useful_scores_per_cycle']:.0f}" for rate in rates)],
        ["MXU busy", *(f"{rate['units']['MXU']:.0%}" for rate in rates)],
        ["memory of a device", *map(gib, guided)],
        ["a step, no guidance", *(seconds(found, 3) for found in alone)],
    ]
    return table(["", *slices], rows)


# The published models by their names on the hub, without "zai-org/".
HUB_NAMES = ("CogVideoX1.5-5B", "CogVideoX1.5-5B-I2V", "CogVideoX-5b", "CogVideoX-5b-I2V", "CogVideoX-2b")


def published_models() -> Iterator[tuple[str, str, bool, tuple[int, int, int]]]:
    """Yield each model's name on the hub and in configs/, whether it takes an image, and its size."""
    for name in HUB_NAMES:
        folder = published.by_name(name)
        assert folder, name
        size = generation_defaults.of_model(name).entries
        takes_image = features_of(json.loads((folder / "transformer" / "config.json").read_text())).image
        yield name, folder.name, takes_image, (size["height"], size["width"], size["frames"])


def models(heading: Sequence[str], text: str, image: str) -> str:
    """Return the published models, and what a guided step of their size takes, with words in a page's language."""
    rows = []
    for name, model, takes_image, size in published_models():
        steps = (seconds(step(topology, size, True, model)) for topology in V6E)
        link = f"[zai-org/{name}](https://huggingface.co/zai-org/{name})"
        rows.append([link, image if takes_image else text, size_text(size), *steps])
    return table([*heading, *V6E], rows)


def other_models() -> str:
    """Return memory, seconds and the kernel's rate of a guided step of each published model in its own size."""
    rows = []
    for _, model, _, size in published_models():
        for topology in V6E:
            name = reports.step_file(topology, size, True, model)
            rate = f"{kernel(name)['useful_scores_per_cycle']:.0f}"
            mesh = " x ".join(re.findall(r"\d+", result(name)["options"]["mesh"]))
            rows.append([model, size_text(size), topology, mesh, gib(result(name)), seconds(result(name), 3), rate])
    heading = ["model", "size", "slice", "mesh (dp x sp x tp)", "memory of a chip", "a step, predicted"]
    return table([*heading, "useful scores a cycle"], rows)


def compile_report() -> str:
    """Return the parts of a report that the page of the compile tool explains, as the tool prints them."""
    lines = report.text(result(GUIDED)).splitlines()
    slowest = lines.index("  slowest operations, predicted")
    attention = next(i for i, line in enumerate(lines) if line.startswith("  kernel "))
    shown = [*lines[: slowest + 3], "    ...", *lines[attention : attention + 2]]
    wrapped = (textwrap.fill(line, 116, subsequent_indent=" " * 13, break_long_words=False) for line in shown)
    return "\n".join(["```text", *wrapped, "```"])


# --- Beside what others measured ---------------------------------------------------------------------------------

CONFIGURATIONS = {
    "1": "baseline, 768 x 1360 x 81 with guidance",
    "2": "+ sharding constraint",
    "3": "+ dp",
    "4": "+ mesh order",
    "5": "+ exp2 kernel, Wan2.1 block sizes",
    "6": "768 x 1360 x 81, no guidance",
    "7": "640 x 1280 x 61, no guidance",
    "8": "640 x 1280 x 61, no guidance",
    "9": "640 x 1280 x 61, no guidance",
    "splash": "as row 9, with JAX's Splash Attention",
    "10": "720 x 1280 x 81 with guidance, dp 2 x tp 4",
    "11": "640 x 1280 x 61 with guidance, dp 2 x tp 4",
    "12": "640 x 1280 x 61 with guidance, tp 8",
}


def steps() -> str:
    """Return each row of the original project's tables beside our own step in the same size on the same chips."""
    heading = ["row", "configuration of the original project", "slice", "measured by its authors"]
    heading += ["predicted for it", "ratio", "ours, predicted"]
    saved = result("tables.json")
    rows = []
    for name, configuration in CONFIGURATIONS.items():
        row = saved[name]
        original = [f"{row['measured']:.2f} s", f"{row['predicted_seconds']:.2f} s", f"{row['ratio']:.2f}"]
        rows.append([name, configuration, row["topology"], *original, seconds(step_of(row), 3)])
    return table(heading, rows)


def step_of(row: Mapping) -> dict:
    """Return the report of our step in the size of a row of the original project, on its chips."""
    return step(row["topology"], row["size"], row["guided"])


def speed(heading: Sequence[str], labels: Sequence[str], small_decode: str) -> str:
    """Return the README's rows of speed, with the heading and the first cells in its language."""
    rows = result("tables.json")
    cells = []
    for label, name in zip(labels, ("5", "8", "9"), strict=False):
        row = rows[name]
        cells.append([label, row["topology"], f"{row['measured']:.2f} s", f"**{seconds(step_of(row))}**"])
    cells.append([labels[3], "v6e-8", small_decode, f"**{seconds(decode('v6e-8', SMALL))}**"])
    return table(heading, cells)


def on_gpu() -> str:
    """Return the steps that benchmarks.on_device has measured on an NVIDIA H200, beside diffusers on the same one."""
    entries, theirs = (result(f"{of}-nvidia-h200.json")["entries"] for of in ("on_device", "diffusers"))
    rows = []
    for name, entry in entries.items():
        if name.startswith("step, ") and entry["status"] == "measured":
            row = [name.removeprefix("step, "), f"{entry['seconds']:.2f} s", f"{entry['allotted_gib']:.1f} GiB"]
            other = theirs.get(name)
            rows.append(row + ([f"{other['seconds']:.2f} s", f"{other['peak_gib']:.1f} GiB"] if other else ["-", "-"]))
    heading = ["size", "a step, median of five", "memory", "a step of diffusers", "its memory"]
    return table(heading, sorted(rows))


MEASURED_KERNELS = {
    "1": ("Flywheel 0.1.0", "v6e"),
    "2": ("Flywheel 0.1.0", "v6e"),
    "3": ("tokamax's Splash Attention, blocks 2048/4096/1024", "v6e"),
    "4": ("the same, blocks 2048/2048/512", "a core of 7x"),
}


def measured_kernels() -> str:
    """Return what was measured of other projects' kernels beside what is predicted for them."""
    heading = ["row", "kernel", "chip", "tokens", "measured, TFLOP/s", "predicted, TFLOP/s"]
    heading += ["ratio of the seconds", "MXU busy, predicted"]
    rows = []
    for name, (label, chip) in MEASURED_KERNELS.items():
        row = result("measured_kernels.json")[name]
        measured = f"{row['measured']:.0f}" if float(row["measured"]).is_integer() else f"about {row['measured']:.0f}"
        predicted = [f"{row['predicted']:.0f}", f"{row['ratio']:.2f}", f"{row['mxu']:.0%}"]
        rows.append([name, label, chip, f"{row['tokens']:,}", measured, *predicted])
    return table(heading, rows)


def trust(sentence: str = "") -> str:
    """Return the sentence that says how far to trust predicted seconds, in the lines of a page.

    `sentence` is a translation of the compile tool's, with places for the least, the largest, and how many there are.
    """
    found = report.times_predicted()
    text = sentence.format(min(found), max(found), len(found)) if sentence else report.trust()
    return f"**{text}**" if sentence else textwrap.fill(f"**{text}**", 120)


def span(values: Iterable[float]) -> str:
    """Return the least and the largest of some values."""
    found = list(values)
    return f"{min(found):.2f} to {max(found):.2f}"


def fifty_steps(factor: float = 1) -> str:
    """Return the predicted seconds of 50 steps of the default video, or some times as many."""
    return f"{50 * result(GUIDED)['predicted_seconds'] * factor:.0f}"


def dollars(minutes: float) -> str:
    """Return what v6e-8 costs in some minutes, on demand."""
    return f"{8 * CHIP_HOUR * minutes / 60:.2f}"


def original_ratios() -> list[float]:
    """Return predicted to measured seconds of the original project's configurations."""
    return [row["ratio"] for row in result("tables.json").values()]


def busy_ratio(row: str = "1") -> float:
    """Return predicted to measured seconds of a kernel that keeps the matrix unit nearly as busy as ours."""
    return result("measured_kernels.json")[row]["ratio"]


def summary(pattern: str) -> str:
    """Return what a pattern finds in the summary of benchmarks.reproduce_tables over all rows."""
    match = re.search(pattern, reproduce_tables.summary(result("tables.json")))
    assert match, "benchmarks.reproduce_tables.summary has another text"
    return match[1]


# --- Quality -----------------------------------------------------------------------------------------------------

SOURCES = {
    "true clips": "true clips",
    "true clips, through the VAE": "through VAE",
    "diffusers, float32": "diffusers",
    "our stages, float32": "ours",
    "untrained weights (must fail)": "untrained",
    "chance": "chance",
}


def quality(file: str = "quality.json", held_out: str = "captions") -> str:
    """Return how many videos of what was held out show what each attribute says."""
    shares = result(file)["adherence"]["held out"]
    attributes = [*shares["true clips"]]
    rows = [
        [label, *(f"{shares[name][key]:.0%}" if key in shares[name] else "" for key in attributes)]
        for label, name in SOURCES.items()
    ]
    return table([f"share of the videos that show it, held-out {held_out}", *attributes], rows)


# The steps of 50 that run the blocks, for one prompt or two: what stage 2 says of each option with the tiny model.
BLOCKS = {
    "--cache_threshold 0.1": "29 of 50 steps",
    "--cache_threshold 0.2": "16 of 50 steps",
    "--cache_threshold 0.3": "12 of 50 steps",
    "--guidance_interval 0,24": "all, in 25 steps for one prompt alone",
    "--guidance_interval 0,9": "all, in 40 steps for one prompt alone",
    "--preset authors": "all; another sampler, for comparison",
}


def quality_options() -> str:
    """Return what the options that save steps do to the videos."""
    found = result("quality-options.json")
    kinds = found["adherence"].values()

    def adherence(name: str) -> str:
        return f"{min(share for shares in kinds for share in shares[name].values()):.0%}"

    rows = [["none", "all", adherence("ours"), "", ""]]
    for option, blocks in BLOCKS.items():
        psnr = found["psnr"][f"{option} against ours"]
        rows.append([f"`{option}`", blocks, adherence(option), f"{psnr['median']:.1f} dB", f"{psnr['least']:.1f} dB"])
    return table(["option", "blocks run in", "adherence, the worst attribute", "PSNR, median", "least"], rows)


# --- Many machines -------------------------------------------------------------------------------------------------


def fleet(name: str) -> str:
    """Return a table that `python -m fleet.forecast` prints."""
    heading, *rows = result("fleet-forecast.json")[name]
    return table(heading, rows)


# --- The package's files -------------------------------------------------------------------------------------------


def package_files() -> str:
    """Return the modules of each folder of the package, each with the first line that it says of itself."""
    package, parts = ROOT / "cogvideox", []
    for folder in sorted({path.parent for path in package.rglob("*.py")}):
        modules = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        if modules:
            rows = [[f"`{path.name}`", first_line(path)] for path in modules]
            heading = f"### {folder.relative_to(ROOT)}/\n\n{first_line(folder / '__init__.py')}\n\n"
            parts.append(heading + table(["file", "what it does"], rows))
    return "\n\n".join(parts)


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


FIGURES: dict[str, Callable[[], str]] = {
    "useful scores at 25,826": lambda: f"{kernel('kernel-v6e-1-25826.json')['useful_scores_per_cycle']:.0f}",
    "useful scores at 45,106": lambda: f"{kernel(GUIDED)['useful_scores_per_cycle']:.0f}",
    "MXU busy": lambda: f"{kernel('kernel-v6e-1-25826.json')['units']['MXU']:.0%}",
    "MXU busy, expected": lambda: f"{kernel('kernel-v6e-1-25826.json')['units']['MXU'] * busy_ratio():.0%}",
    "expected scores at 25,826": lambda: (
        f"{round(kernel('kernel-v6e-1-25826.json')['useful_scores_per_cycle'] * busy_ratio(), -1):.0f}"
    ),
    "expected scores at 45,106": lambda: f"{round(kernel(GUIDED)['useful_scores_per_cycle'] * busy_ratio(), -1):.0f}",
    "attention in a step": lambda: f"{attention_seconds(GUIDED):.2f}",
    "attention in a step, expected": lambda: f"{attention_seconds(GUIDED) / busy_ratio():.2f}",
    "count of measured programs": lambda: str(len(report.times_predicted())),
    "steps, measured to predicted": lambda: span(1 / ratio for ratio in original_ratios()),
    "7x, measured to predicted": lambda: f"{1 / busy_ratio('4'):.2f}",
    "7x attention in a step": lambda: f"{attention_seconds(SEVEN_X):.2f}",
    "7x attention in a step, expected": lambda: f"{attention_seconds(SEVEN_X) / busy_ratio('4'):.2f}",
    "7x step": lambda: f"{result(SEVEN_X)['predicted_seconds']:.2f}",
    "7x step, expected": lambda: (
        f"{result(SEVEN_X)['predicted_seconds'] + attention_seconds(SEVEN_X) * (1 / busy_ratio('4') - 1):.2f}"
    ),
    "kernels, measured to predicted": lambda: span(1 / busy_ratio(row) for row in MEASURED_KERNELS),
    "flywheel, measured to predicted": lambda: f"{1 / busy_ratio():.1f}",
    "one second, in the range": lambda: span(report.times_predicted()),
    "rank correlation": lambda: summary(r"rank correlation ([\d.]+)"),
    "median error": lambda: summary(r"median error (\d+%)"),
    "fitted factor": lambda: summary(r"times ([\d.]+)"),
    "median error with the factor": lambda: summary(r"rows, median error (\d+%)"),
    "ten steps": lambda: f"{10 * result(GUIDED)['predicted_seconds']:.1f}",
    "fifty steps": fifty_steps,
    "fifty steps, in the range": lambda: " to ".join(fifty_steps(f(report.times_predicted())) for f in (min, max)),
    "least seconds of stage 2": lambda: f"{compile_seconds('stage2')[0]:.0f}",
    "most seconds of stage 2": lambda: f"{compile_seconds('stage2')[1]:.0f}",
    "least minutes of stage 3": lambda: f"{compile_seconds('stage3')[0] / 60:.0f}",
    "most minutes of stage 3": lambda: f"{compile_seconds('stage3')[1] / 60:.0f}",
    "a video of eight": lambda: f"{with_option('videos_at_once=8')['predicted_seconds'] / 8:.3f}",
    "share of statistics": share_of_statistics,
    "a chip an hour": lambda: f"{CHIP_HOUR:.2f}",
    "v6e-8 an hour": lambda: dollars(60),
    "v6e-8 half an hour": lambda: dollars(30),
    "v6e-8 two minutes": lambda: dollars(2),
}


def compile_seconds(what: str) -> tuple[float, float]:
    """Return the least and the most seconds that compiling a stage by default took, over slices of v6e."""
    paths = [path for path in report.RESULTS.glob(f"{what}-v6e-*.json") if "=" not in path.name]
    found = [result(path.name)["compile_seconds"] for path in paths]
    return min(found), max(found)


TABLES: dict[str, Callable[[], str]] = {
    "package files": package_files,
    "memory": memory,
    "decoder": decoder,
    "several hosts": several_hosts,
    "saved steps": saved_steps,
    "sparse steps": sparse_steps,
    "groups": groups,
    "compile report": compile_report,
    "steps": steps,
    "measured kernels": measured_kernels,
    "on an NVIDIA GPU": on_gpu,
    "quality": quality,
    "quality options": quality_options,
    "quality of image to video": lambda: quality("quality-tiny_model_i2v.json", "pictures"),
    **{
        f"fleet, {name}": functools.partial(fleet, name)
        for name in ("assumptions", "settings", "hosts", "losses", "limits")
    },
    "other TPUs": other_tpus,
    "7x": seven_x,
    "other models": other_models,
    "models": lambda: models(["`--model_id`", "from", "size"], "text", "text and an image"),
    "models in Chinese": lambda: models(["`--model_id`", "输入", "尺寸"], "文字", "文字和图片"),
    "trust": trust,
    "trust in Chinese": lambda: trust(
        "请预期预测秒数的 {:.2f} 到 {:.2f} 倍：别人在 TPU 上实测过的 {} 个程序都落在这个范围内，"
        "整步靠近下限，attention kernel 靠近上限。"
    ),
    "speed": lambda: speed(
        [
            "CogVideoX1.5-5B in bfloat16",
            "slice",
            "original project, **measured** by its authors",
            "here, **predicted**",
        ],
        [
            "a step, 768 x 1360 x 81, guidance",
            "a step, 640 x 1280 x 61, no guidance",
            "the same; they measured 2.02 s on an NVIDIA H200",
            "decoding all frames, 640 x 1280 x 61",
        ],
        "2.4 s, probably at this size",
    ),
    "speed in Chinese": lambda: speed(
        ["CogVideoX1.5-5B，bfloat16", "切片", "原项目，**实测**", "本项目，**预测**"],
        [
            "每步，768 x 1360 x 81，使用引导",
            "每步，640 x 1280 x 61，不用引导",
            "同上；原项目作者在 NVIDIA H200 上测得 2.02 s",
            "解码全部帧，640 x 1280 x 61",
        ],
        "2.4 s，很可能是在这个尺寸下测得",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the figures of all pages, or say which differ."""
    parser = ArgumentParser(__doc__.splitlines()[0], prog="python -m benchmarks.write_figures")
    parser.add_argument("--check", action="store_true", help="write nothing; end with status 2 if a figure differs")
    arguments = parser.parse_args(argv)
    stale = []
    for path in pages():
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        new = with_figures(text)
        if new == text:
            continue
        stale.append(name)
        print("\n".join(difflib.unified_diff(text.splitlines(), new.splitlines(), name, f"{name}, new", "", "", 0, "")))
        if not arguments.check:
            with writing.replacing(path) as temporary:
                Path(temporary).write_text(new, encoding="utf-8")
    if stale and arguments.check:
        raise UserError(f"figures in {', '.join(stale)} or lists of files there are stale; run this without --check")
    if not stale:
        print("every figure is as in benchmarks/results/, and every list of files as the package")


if __name__ == "__main__":
    run(main)
