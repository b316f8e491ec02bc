"""The map of sparse attention: the file, what it was found for, made-up maps, and the plan that comes of them."""

import json
import re
from pathlib import Path

import jax
import pytest

from cogvideox.errors import UserError
from cogvideox.files import provenance, sparse_map
from cogvideox.files.sparse_map import SparseMap
from cogvideox.models.transformer.sparse.patterns import KINDS, Pattern
from cogvideox.run import plans, sparse_maps
from tests.helpers import CONFIG, LATENTS, SIZE, STAGE2, values

TRANSFORMER = {"num_layers": 2, "num_attention_heads": 3}
SIZE_OF_MAP = {"height": 32, "width": 48, "frames": 9}
WEIGHTS, OTHER_WEIGHTS = "0" * 64, "1" * 64
MAP = SparseMap(
    **SIZE_OF_MAP,
    weights=WEIGHTS,
    loras=("2" * 64 + ":0.5",),
    error_budget=0.05,
    found={"prompts": ["一只狐狸", 'a "fox"'], "seed": 3, "steps": [0, 5]},
    patterns=(("dense", "frames:1", "positions:12"), ("frames:0", "dense", "dense")),
)


def test_a_map_is_read_as_it_was_written(tmp_path):
    """With a line for each layer; it is found by its folder, too."""
    path = tmp_path / sparse_map.FILE
    sparse_map.write(path, MAP)
    assert sparse_map.read(path) == MAP
    assert list(tmp_path.iterdir()) == [path]
    lines = path.read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-4].strip().rstrip(",")) == ["dense", "frames:1", "positions:12"], lines
    assert sparse_map.find(tmp_path, "no/model") == sparse_map.find(path, "no/model") == path


def test_the_models_own_map(tmp_path, monkeypatch):
    path = tmp_path / "model" / "transformer" / sparse_map.FILE
    sparse_map.write(path, MAP)
    monkeypatch.chdir(tmp_path)
    assert sparse_map.find("auto", "model") == path


def test_patterns_are_those_of_the_transformer():
    """What a map may say is what `Pattern` reads, and the other way round."""
    for text in ("dense", "frames:1", "positions:20"):
        assert re.fullmatch(sparse_map.PATTERN, text) and str(Pattern.parse(text)) == text
    assert all(re.match(sparse_map.PATTERN, kind if kind == "dense" else f"{kind}:1") for kind in KINDS)
    for text in ("dense:1", "frames", "frames:-1", "frame:1", "frames:1 "):
        assert not re.fullmatch(sparse_map.PATTERN, text)
        with pytest.raises(ValueError, match="is no pattern"):
            Pattern.parse(text)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"patterns": [["dense"], ["frame:1"]]}, ["layer 1, head 0: 'frame:1' is no pattern"]),
        ({"patterns": [["dense", 3]]}, ["patterns.0.1: ", "not 3"]),
        ({"patterns": []}, ["patterns: ", sparse_map.TOOL]),
        ({"height": "32"}, ["height: ", "'32'"]),
        ({"frames": 0}, ["frames: ", "not 0"]),
        ({"weights": "x"}, ["weights: "]),
        ({"error_budget": 2}, ["error_budget: "]),
        ({"patern": []}, ["patern: "]),
    ],
    ids=str,
)
def test_a_damaged_map(entries, words, tmp_path):
    path = tmp_path / "map.json"
    sparse_map.write(path, MAP)
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries))
    with pytest.raises(UserError) as error:
        sparse_map.read(path)
    assert all(word in str(error.value) for word in [f"{path}: ", *words]), error.value


@pytest.mark.parametrize(
    ("transformer", "size", "words"),
    [
        ({}, {"height": 64}, "was found for height 32, and this run has --height 64: "),
        ({}, {"width": 64, "frames": 5}, "was found for width 48, frames 9, and this run has --width 64, --frames 5: "),
        ({"num_layers": 30}, {}, "has 2 layers, and the model 30: "),
        ({"num_attention_heads": 48}, {}, "has 3 heads in layer 0, and the model 48: "),
    ],
    ids=str,
)
def test_a_map_of_something_else(transformer, size, words, tmp_path):
    sparse_map.check_size(MAP, tmp_path, TRANSFORMER, SIZE_OF_MAP)
    with pytest.raises(UserError, match=words):
        sparse_map.check_size(MAP, tmp_path, TRANSFORMER | transformer, SIZE_OF_MAP | size)


def test_other_weights_are_refused_and_other_loras_told(tmp_path):
    told: list[str] = []
    for known in (WEIGHTS, None):  # of a model whose weights are elsewhere
        sparse_map.check_weights(MAP, tmp_path, known, MAP.loras, told.append)
    assert not told
    sparse_map.check_weights(MAP, tmp_path, WEIGHTS, (), told.append)
    assert len(told) == 1 and "was found with other LoRAs" in told[0], told
    with pytest.raises(UserError, match=r"other weights or another config, 00000000, than .* run has, 11111111"):
        sparse_map.check_weights(MAP, tmp_path, OTHER_WEIGHTS, MAP.loras, told.append)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5*frames:1", {"frames:1": 24}),
        ("1*positions:0", {"positions:0": 48}),
        (".3*frames:1+.3*positions:2+.4*frames:2", {"frames:1": 14, "positions:2": 15, "frames:2": 19}),
        ("0.01*frames:1", {}),
    ],
)
def test_made_up_maps(text, expected):
    patterns = sparse_map.made_up(text, 42, 48)
    assert len(patterns) == 42 and len(set(patterns)) == 1
    counts = {pattern: patterns[0].count(pattern) for pattern in patterns[0]}
    assert counts == expected | ({"dense": 48 - sum(expected.values())} if sum(expected.values()) < 48 else {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.5*frame:1", "frame:1 is no pattern"),
        ("0.5*frames:1+", "SHARE*PATTERN"),
        ("nan*frames:1", "nan*frames:1 is not"),
        ("-1*frames:1", "-1*frames:1 is not"),
        ("0.6*frames:1+0.5*positions:2", "1.1 of all heads"),
    ],
)
def test_made_up_maps_that_are_wrong(text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        sparse_map.made_up(text, 2, 4)


def test_the_compile_tool_makes_plans_of_made_up_maps():
    from compile_for_tpu import __main__, programs

    words = ["stage2", "--sparse_attention", "0.5*frames:1", "--dense_steps", "0.1"]
    arguments = __main__.parse_arguments(words)
    plan = plans.denoising_plan(arguments, arguments.model_id, jax.devices()[:1], "cpu", 1)
    assert plan.sparse.patterns == ((Pattern("frames", 1),) * 24 + (Pattern(),) * 24,) * 42
    assert plan.sparse.dense_steps == 0.1
    # Of 11 frames those at both ends have 2 of 3; text is for all.
    assert sparse_maps.density(plan) == pytest.approx((1 + (2 * 2 + 9 * 3) / 11**2) / 2, abs=0.01)
    labels = programs.labels(arguments, defaults=__main__.parse_arguments(["stage2"]))
    assert labels == ["768x1360x81", "guided", "sparse_attention=0.5xframes1"]
    arguments.sparse_attention = Path("a/map.json")
    assert programs.labels(arguments, defaults=__main__.parse_arguments(["stage2"]))[-1] == "sparse_attention=map"


@pytest.mark.slow
def test_a_run_with_a_map(outputs, random_model, run_stage, tmp_path):
    """It is said, kept with the video, and finished as long as the map says the same, wherever it is."""
    path = tmp_path / "maps" / sparse_map.FILE
    found = MAP.model_dump() | {"weights": sparse_map.weights_of(str(random_model), None), "loras": ()}
    found |= {"patterns": (("dense", "frames:0", "frames:0", "positions:0"), ("frames:0", *["dense"] * 3))}
    sparse_map.write(path, SparseMap(**found))
    options = ("--input_dir", outputs, *SIZE, "--num_videos_per_prompt", 2, "--output_dir", "new")

    printed = run_stage(STAGE2, *options, "--sparse_attention", "maps").stdout
    assert "sparse attention: of 8 heads 3 in frames, 1 in positions, 4 dense, " in printed, printed
    assert (
        f"from {path}, found for 32 x 48 x 9 and a relative error of 0.05; dense steps at the beginning: 1 of 2"
        in printed
    )
    (latents,) = tmp_path.glob("new/*42/" + LATENTS)
    config = json.loads((latents.parent / CONFIG).read_text())
    assert (config["sparse_attention"], config["dense_steps"]) == (str(path), 0.25)
    made = provenance.recorded(latents)
    assert made["inputs"][str(path)] == provenance.file_digest(path)
    assert made["plan"]["sparse heads"] == "3 in frames, 1 in positions, 4 dense"
    sparse = values(latents)
    said = run_stage("utils.py", "status", "new").stdout
    assert "stale" not in said and "3 in frames" in said, said

    moved = path.rename(tmp_path / "m.json")
    printed = run_stage(STAGE2, *options, "--sparse_attention", moved).stdout
    assert "already finished: 2 of 2" in printed, printed
    sparse_map.write(moved, SparseMap(**found | {"patterns": (("dense",) * 4,) * 2}))
    printed = run_stage(STAGE2, *options, "--sparse_attention", moved).stdout
    assert "already finished" not in printed and printed.count("wrote") == 2, printed
    assert values(latents) != sparse, "the patterns changed nothing"
