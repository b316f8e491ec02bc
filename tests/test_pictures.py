"""The pictures: their numbers against formulas and numpy, their colours against decoded videos, the files as files."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from cogvideox.errors import UserError
from cogvideox.files import latent_pictures
from cogvideox.files.latent_pictures import COMPONENTS, NOT_FINITE, LatentMap
from cogvideox.inspection import figure, heat_maps, pictures
from cogvideox.inspection.items import Item, items, opened
from cogvideox.inspection.pictures import Entry
from tests.helpers import CONFIG, LATENTS, ROOT, STAGE1, STAGE2, STAGE3, TINY_MODEL
from tools import fit_latent_rgb
from tools.moving_shapes import ALL, held_out, render

TOOL = "inspect_tensors.py"


def picture(path) -> np.ndarray:
    """Read a PNG file, uint8 [height, width, 3]."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


# --- Colours of latents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 4, 16])
def test_least_squares_recover_a_known_map(channels):
    """Exactly without noise; with noise, what is explained is the share of the variance that is no noise."""
    random = np.random.default_rng(channels)
    latents, weights, bias = random.normal(size=(3000, channels)), random.normal(size=(channels, 3)), random.random(3)
    colours = latents @ weights + bias
    found, found_bias = fit_latent_rgb.fit(latents, colours)
    np.testing.assert_allclose(found, weights, atol=1e-9)
    np.testing.assert_allclose(found_bias, bias, atol=1e-9)
    noisy = colours + random.normal(scale=0.5, size=colours.shape)
    found, found_bias = fit_latent_rgb.fit(latents, noisy)
    share = fit_latent_rgb.explained(latents @ found + found_bias, noisy)
    expected = np.square(weights).sum() / (np.square(weights).sum() + 3 * 0.5**2)
    assert share == pytest.approx(expected, abs=0.03), (share, expected)


@pytest.mark.parametrize("shape", [(9, 8, 16), (5, 8, 24), (17, 64, 32)], ids=str)
def test_mean_colours_of_the_pixels_of_a_latent(shape):
    frames, height, width = shape
    clip = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    t, h, w = (frames - 1) // 4 + 1, height // 8, width // 8
    found = fit_latent_rgb.mean_colours(clip, (t, h, w))
    assert found.shape == (3, t, h, w)
    for i, j, k in np.ndindex(t, h, w):
        first, last = (0, 1) if i == 0 else (4 * i - 3, 4 * i + 1)
        block = clip[first:last, 8 * j : 8 * j + 8, 8 * k : 8 * k + 8]
        np.testing.assert_allclose(found[:, i, j, k], block.mean(axis=(0, 1, 2)) / 255, atol=1e-12)


def test_colours_are_linear_clipped_and_mark_what_is_not_finite():
    random = np.random.default_rng(0)
    latents, weights, bias = random.normal(size=(4, 3, 5, 7)).astype(np.float32), random.random((4, 3)), np.full(3, 0.5)
    latents[1, 2, 3, 4], latents[0, 0, 0, 0], latents[2, 1, 1, 1] = np.nan, np.inf, 3e38
    found = latent_pictures.latents_to_rgb(latents, LatentMap(weights, bias, ""))
    assert found.shape == (3, 5, 7, 3) and found.dtype == np.uint8
    for t, h, w in np.ndindex(3, 5, 7):
        expected = [
            min(max(sum(float(latents[c, t, h, w]) * weights[c, r] for c in range(4)) + 0.5, 0), 1) for r in range(3)
        ]
        if np.isfinite(latents[:, t, h, w]).all():
            np.testing.assert_allclose(found[t, h, w] / 255, expected, atol=0.51 / 255)
        else:
            assert (found[t, h, w] == NOT_FINITE).all()
    assert (found == NOT_FINITE).all(axis=-1).sum() == 2 and 0 < (found == 255).mean() < 0.9


@pytest.mark.parametrize("shape", [(16, 5, 8, 8), (3, 2, 9, 4), (2, 4, 5, 6), (1, 3, 8, 8)], ids=str)
def test_principal_components_against_svd(shape):
    """The scores of the components, taken back out of the colours, are those of the singular value decomposition."""
    random = np.random.default_rng(shape[0])
    mixing = random.normal(size=(shape[0], shape[0])) * np.geomspace(1, 0.01, shape[0])
    latents = np.einsum("dc,cthw->dthw", mixing, random.normal(size=shape)) + random.normal(size=(shape[0], 1, 1, 1))
    mapping = latent_pictures.principal_components(latents)
    values = latents.reshape(shape[0], -1).T
    scores = (values @ mapping.weights + mapping.bias - 0.5) @ np.linalg.inv(COMPONENTS)
    centred = values - values.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    for i in range(min(3, shape[0])):
        correlation = np.corrcoef(scores[:, i], centred @ directions[i])[0, 1]
        assert abs(correlation) > 1 - 1e-9, f"component {i}: {correlation}"
        np.testing.assert_allclose(np.quantile(scores[:, i], [0.01, 0.99]), [-0.5, 0.5], atol=1e-9)
    np.testing.assert_allclose(scores[:, shape[0] :], 0, atol=1e-12)
    np.testing.assert_allclose(latent_pictures.principal_components(-latents).weights, mapping.weights, atol=1e-9)


def test_principal_components_of_latents_that_have_none():
    """Latents that are all equal are gray; of others, what is not finite is left out."""
    assert (latent_pictures.latents_to_rgb(np.full((4, 2, 3, 3), 7.0), None) == 128).all()
    nothing = np.full((4, 2, 3, 3), np.nan)
    assert (latent_pictures.latents_to_rgb(nothing, None) == NOT_FINITE).all()
    latents = np.random.default_rng(0).normal(size=(4, 2, 3, 3))
    mapping = latent_pictures.principal_components(np.concatenate([latents, nothing], axis=1))
    np.testing.assert_allclose(mapping.weights, latent_pictures.principal_components(latents).weights)


def test_where_a_fitted_map_is_found(tmp_path, monkeypatch):
    """In the model's folder, in the cache of the Hub, and nowhere else; a broken one is said to be broken."""
    content = {"weights": [[1, 2, 3], [4, 5, 6]], "bias": [7, 8, 9], "fitted_on": "squares"}
    cache = tmp_path / "cache" / "models--some--model"
    for folder in (tmp_path / "model", cache / "snapshots" / "abc"):
        (folder / "vae").mkdir(parents=True)
        (folder / "vae" / "latent_rgb.json").write_text(json.dumps(content))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for model in (str(tmp_path / "model"), "some/model"):
        found = latent_pictures.fitted_map(model)
        assert found is not None, model
        assert found.weights.tolist() == content["weights"] and found.bias.tolist() == content["bias"]
        assert found.origin == "colours fitted on squares"
    for model in (str(tmp_path), str(tmp_path / "gone"), "some/other", "~"):
        assert latent_pictures.fitted_map(model) is None
    for text in ("{", "[]", "{}", json.dumps(content | {"weights": [[1, 2]]}), json.dumps(content | {"bias": 1})):
        (tmp_path / "model" / "vae" / "latent_rgb.json").write_text(text)
        with pytest.raises(UserError, match=r"latent_rgb\.json.* again"):
            latent_pictures.fitted_map(str(tmp_path / "model"))


@pytest.mark.slow
def test_the_tools_map_is_for_latents_as_stage_2_saves_them(tmp_path, random_model, capsys):
    """Encoded clips, divided by scaling_factor, decode to the clips, and have their colours under the shipped map."""
    from diffusers import AutoencoderKLCogVideoX

    clips = [render(caption, np.random.default_rng(9)) for caption in held_out()[::13]]
    latents = fit_latent_rgb.encode(TINY_MODEL / "vae", clips)
    vae = AutoencoderKLCogVideoX.from_pretrained(TINY_MODEL / "vae", torch_dtype=torch.float32)
    mapping = latent_pictures.fitted_map(str(TINY_MODEL))
    with torch.inference_mode():
        decoded = vae.decode(torch.from_numpy(latents[:1]) / vae.config.scaling_factor).sample[0]
    error = np.square((decoded.permute(1, 2, 3, 0).numpy() + 1) * 127.5 - clips[0]).mean()
    assert 10 * np.log10(255**2 / error) > 25, error
    truth = np.stack([fit_latent_rgb.mean_colours(clip, latents.shape[2:]) for clip in clips])
    colours = (
        np.moveaxis(np.stack([latent_pictures.latents_to_rgb(latent, mapping) for latent in latents]), -1, 1) / 255
    )
    share = fit_latent_rgb.explained(fit_latent_rgb.rows(colours), fit_latent_rgb.rows(truth))
    assert share > 0.98, f"{share:.1%} of the variance of clips that nothing was fitted on"
    shutil.copytree(random_model / "vae", tmp_path / "model" / "vae")
    fit_latent_rgb.main([str(tmp_path / "model"), "--clips", "2"])
    assert "of the variance of the colours" in capsys.readouterr().out
    assert latent_pictures.fitted_map(str(tmp_path / "model")).weights.shape == (16, 3)


def test_wrong_models_of_the_tool(tmp_path):
    (tmp_path / "empty").mkdir()
    for model, words in (("nowhere", "nowhere"), ("empty", r"has no vae/config\.json")):
        with pytest.raises(UserError, match=words):
            fit_latent_rgb.main([str(tmp_path / model)])
    assert not list((tmp_path / "empty").iterdir())


# --- A preview ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 5, 8, 8), (4, 1, 3, 5), (4, 21, 96, 170), (4, 12, 40, 30)], ids=str)
def test_preview(shape, tmp_path):
    """Every latent frame is there, enlarged by a whole factor, and neither too small to see nor too wide to show."""
    latents = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    path = tmp_path / "preview.png"
    latent_pictures.preview(latents, path, None, "step 3 of 10")
    sheet, cells = picture(path), latent_pictures.latents_to_rgb(latents, None)
    assert shape[3] < sheet.shape[1] <= 1600 and sheet[:20].std() > 0, "a title above"
    factor = max(1, round(160 / shape[3]))
    assert 100 <= factor * shape[3] <= 250
    small = sheet.reshape(-1)  # each cell's first row of pixels, enlarged, is somewhere in the sheet
    for cell in cells:
        row = cell[0].repeat(factor, axis=0).reshape(-1)
        assert small.tobytes().count(row.tobytes()) >= factor
    assert [file.name for file in tmp_path.iterdir()] == ["preview.png"]


def test_a_preview_that_cannot_be_written(tmp_path):
    (tmp_path / "preview.png").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        latent_pictures.preview(np.zeros((4, 1, 3, 5), np.float32), tmp_path / "preview.png", None, "")


def test_a_preview_imports_neither_matplotlib_nor_torch(tmp_path):
    program = (
        "import sys, numpy as np, pathlib; from cogvideox.files.latent_pictures import preview; "
        "preview(np.full((4, 2, 3, 5), np.nan), pathlib.Path('a.png'), None, 'a title' * 50); "
        "assert not {'matplotlib', 'torch', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True)
    assert (picture(tmp_path / "a.png") == NOT_FINITE).all(axis=-1).sum() == 2 * (5 * 32) * (3 * 32)


# --- The figure --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (3, 50, 7), (3, 700_001)], ids=str)
def test_histograms_count_every_finite_value(shape, dtype, tmp_path):
    """Each bin holds as many values as a comparison with its edges counts; the last shape is of several chunks."""
    torch.manual_seed(0)
    tensor = (torch.randn(shape) * 20 + 100).to(dtype)
    if tensor.numel() > 7 and dtype.is_floating_point:
        tensor[0, :2] = torch.nan
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    entry = Entry("x", [items(tmp_path)["x"]])
    found = pictures.histogram_of(entry, [""])
    values = tensor.double().flatten().numpy()
    values = values[np.isfinite(values)]
    bins = zip(found.edges[:-1], found.edges[1:], strict=True)
    expected = np.array([((values >= low) & (values < high)).sum() for low, high in bins])
    expected[-1] += (values == found.edges[-1]).sum()
    assert expected.sum() == values.size
    np.testing.assert_allclose(found.counts[""], expected, atol=2)  # a value may lie on an edge, up to rounding
    assert found.counts[""].sum() == values.size
    assert ("NaN" in found.title) == found.alarming == (values.size < tensor.numel())


def test_bins_of_whole_numbers_hold_equally_many():
    for most in (1, 9, 79, 80, 255, 1000):
        edges = pictures.bin_edges(0, most, 10_000, whole=True)
        counts = np.histogram(np.arange(most + 1), edges)[0]
        assert len(set(counts[:-1])) <= 1 and 0 < counts[-1] <= counts[0] and counts.sum() == most + 1


def test_what_has_no_histogram(tmp_path):
    save_file({"none": torch.full((3,), torch.nan), "empty": torch.zeros(0, 4)}, tmp_path / "x.safetensors")
    for name, item in items(tmp_path).items():
        assert not pictures.histogram_of(Entry(name, [item]), [""]).counts
    pictures.plot(tmp_path / "x.png", [(tmp_path, items(tmp_path))])
    assert picture(tmp_path / "x.png").std() > 0


@pytest.mark.parametrize(
    ("largest", "factor"), [(255, 1), (128, 1), (127, 2), (51, 5), (25, 10), (1, 200), (0, 1), (300, 0.5)]
)
def test_differences_are_brightened(largest, factor):
    found = pictures.brightening(np.full(10, largest, float), 255.0)
    assert found == pytest.approx(factor)


@pytest.fixture
def two_runs(tmp_path):
    """Two folders of latents and frames; those of b differ from those of a at one place."""
    random = np.random.default_rng(0)
    latents, frames = random.normal(size=(1, 16, 3, 6, 8)), random.integers(0, 200, (9, 24, 32, 3)).astype(np.uint8)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file({"latents": torch.from_numpy(latents).float()}, tmp_path / folder / LATENTS)
        save_file({"frames": torch.from_numpy(frames)}, tmp_path / folder / "frames.safetensors")
        latents, frames = latents.copy(), frames.copy()
        latents[0, :, 1, 2, 3] += 0.04
        frames[8, 5, 6] += np.array([50, 0, 10], np.uint8)
    return tmp_path / "a", tmp_path / "b"


def test_sheets_of_differences(two_runs):
    """The third row is the difference times the factor that the title names."""
    a, b = map(items, two_runs)
    latents, frames = (pictures.sheet_of(Entry(name, (a[name], b[name])), ["A", "B"]) for name in ("latents", "frames"))
    assert latents.columns == ["latent frame 0", "latent frame 1", "latent frame 2"]
    assert "no map is fitted" in latents.title and "× 20; white is 0.05" in latents.title
    difference = latents.rows["|A − B|"].astype(int)
    assert abs(difference[1, 2, 3] - 0.8 * 255).max() <= 1 and (difference > 0).sum() == 3
    # One map for both runs: where the latents are equal, so are the colours.
    assert (latents.rows["A"] != latents.rows["B"]).any(axis=-1).sum() <= 1
    assert frames.columns == [f"frame {i}" for i in (0, 1, 2, 3, 5, 6, 7, 8)] and frames.title.endswith("× 5")
    assert frames.rows["|A − B|"][7, 5, 6].tolist() == [250, 0, 50] and (frames.rows["|A − B|"] > 0).sum() == 2


def test_sheets_of_runs_that_do_not_fit_together(two_runs, tmp_path):
    """Of other sizes and channels, and one that is missing: each run has its row, and there are no differences."""
    a, b = map(items, two_runs)
    save_file({"latents": torch.randn(2, 4, 5, 3, 3)}, tmp_path / LATENTS)
    sheet = pictures.sheet_of(Entry("latents", (a["latents"], items(tmp_path / LATENTS)["latents"])), ["A", "B"])
    assert [rows.shape for rows in sheet.rows.values()] == [(3, 6, 8, 3), (5, 3, 3, 3)] and len(sheet.columns) == 5
    sheet = pictures.sheet_of(Entry("frames", (None, b["frames"])), ["A", "B"])
    assert list(sheet.rows) == ["B"]
    save_file({"latents": torch.zeros(3), "frames": torch.zeros(2, 4, 4, 3)}, tmp_path / "other.safetensors")
    for name, item in items(tmp_path / "other.safetensors").items():
        assert pictures.sheet_of(Entry(name, [item]), [""]) is None


def test_dumps(tmp_path, monkeypatch):
    """In a dump, frames stand before channels; of many pictures, some are drawn; statistics are no tensors."""
    clean = {f"step_{i:03}/pred_original_sample": torch.randn(2, 3, 16, 5, 6) for i in range(20)}
    save_file(clean, tmp_path / "stage2_tensors.safetensors", {"order": "execution"})
    statistics = {"order": "execution", "statistics": json.dumps(["min"]), "step": json.dumps([0, 1])}
    save_file({"norm_out": torch.zeros(2, 6)}, tmp_path / "stage2_statistics.safetensors", statistics)
    found = items(tmp_path)
    assert "step_001/norm_out" in found
    sheets = []
    monkeypatch.setattr(figure, "draw_sheet", lambda _, sheet: sheets.append(sheet))
    monkeypatch.setattr(figure, "draw_histograms", lambda _, histograms: sheets.append(len(histograms)))
    pictures.plot(tmp_path / "x.png", [(tmp_path, found)])
    assert sheets[0] == 20 and len(sheets) == 7
    assert [sheet.title[5:8] for sheet in sheets[1:]] == ["000", "004", "008", "011", "015", "019"]
    latents = clean["step_019/pred_original_sample"][0].transpose(0, 1).numpy()
    np.testing.assert_array_equal(sheets[-1].rows[""], latent_pictures.latents_to_rgb(latents, None))
    only = {name: item for name, item in found.items() if item.row is not None}
    with pytest.raises(UserError, match="nothing to plot"):
        pictures.plot(tmp_path / "x.png", [(tmp_path, only)])


def test_the_map_comes_from_the_model_that_made_the_file(tmp_path):
    latents = torch.randn(1, 16, 2, 4, 4)
    cases = ((str(TINY_MODEL), "fitted on 16 clips"), (str(tmp_path / "gone"), "no map"), (None, "no map"))
    for i, (model, words) in enumerate(cases):
        made_from = {"made_from": json.dumps({"model_id": model})} if model else None
        save_file({"latents": latents}, tmp_path / f"{i}.safetensors", made_from)
        item = items(tmp_path / f"{i}.safetensors")["latents"]
        assert pictures.map_of(item, 4) is None
        assert words in pictures.latents_sheet("", {"": latents[0].numpy()}, pictures.map_of(item, 16)).title


def test_a_figure_of_two_runs_has_more_rows(two_runs, tmp_path):
    a, b = ((folder, items(folder)) for folder in two_runs)
    rows = [
        {"name": "latents", "relative": 0.1, "differs": True},
        {"name": "frames", "relative": None, "differs": True},
    ]
    pictures.plot(tmp_path / "one.png", [a])
    pictures.plot_comparison(tmp_path / "two.png", a, b, rows)
    one, two = picture(tmp_path / "one.png"), picture(tmp_path / "two.png")
    assert one.shape[1] == two.shape[1] and two.shape[0] > one.shape[0] + 300
    assert one.std() > 20 and two.std() > 20


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (301, 900), (1000, 451)], ids=str)
def test_a_matrix_that_is_reduced_keeps_what_is_largest(shape):
    """Wherever the largest value is, and whatever its sign; NaN stays too."""
    random = np.random.default_rng(0)
    for value in (9.0, -9.0, np.nan):
        matrix = random.uniform(-1, 1, shape).astype(np.float32)
        row, column = (int(random.integers(length)) for length in shape)
        matrix[row, column] = value
        found = heat_maps.reduced(matrix)
        assert found.shape == (min(shape[0], heat_maps.MOST_ROWS), min(shape[1], heat_maps.MOST_COLUMNS))
        place = tuple(np.argwhere((found == value) | (np.isnan(found) & np.isnan(value)))[0])
        expected = [
            index * length / whole for index, length, whole in zip((row, column), found.shape, shape, strict=True)
        ]
        assert np.abs(np.subtract(place, expected)).max() <= 1, (place, expected)


TOKENS = {"text": 5, "video": [2, 3, 4], "queries": [1, 5, 28], "heads": [0, 2]}


def dumped(folder, name, tensor, steps=1) -> dict:
    """Save a tensor as a dump of stage 2 does, for some steps, and return the items of the dump."""
    metadata = {"order": "execution", "tokens": json.dumps(TOKENS)}
    opened.cache_clear()
    save_file(
        {f"step_{i:03}/{name}": tensor.clone() for i in range(steps)}, folder / "stage2_tensors.safetensors", metadata
    )
    return items(folder)


def test_tokens_as_a_matrix_and_as_frames(tmp_path):
    """Each token's place is that of its number, in text and video or in the video alone; heads are channels."""
    tokens = torch.arange(2 * 29 * 6, dtype=torch.float32).reshape(2, 29, 6)
    for name, tensor, text in (
        ("transformer_blocks.1.attn1.to_q", tokens, 5),
        ("transformer_blocks.1.attn1.norm_q", tokens.reshape(2, 29, 2, 3).transpose(1, 2).contiguous(), 5),
        ("norm_out", tokens[:, 5:].contiguous(), 0),
    ):
        ((full_name, item),) = dumped(tmp_path, name, tensor).items()
        found = heat_maps.heat_map(full_name, item)
        assert (found.rows, found.columns, found.shape) == ("token", "channel", (24 + text, 6))
        np.testing.assert_array_equal(found.matrices["sample 1 of 2"], tokens[1, 5 - text :])
        sheet = heat_maps.frames_of_tokens(full_name, item)
        assert sheet.columns == ["frame 0 of tokens", "frame 1 of tokens"]
        truth = np.sqrt(np.square(tokens[0, 5:].numpy()).mean(-1)).reshape(2, 3, 4)
        np.testing.assert_array_equal(sheet.rows["sample 0 of 2"], heat_maps.colours(truth))


def test_attention_weights_as_frames(tmp_path):
    """Of the last sample, which is that of the prompt: the mean over the heads, and how much is on the text."""
    weights = torch.softmax(torch.randn(2, 2, 3, 29, generator=torch.Generator().manual_seed(0)) * 3, dim=-1)
    ((name, item),) = dumped(tmp_path, "transformer_blocks.1.attn1.weights", weights).items()
    assert heat_maps.heat_map(name, item).shape == (6, 29)
    sheet = heat_maps.frames_of_tokens(name, item)
    mean = weights[1].mean(0)
    share = mean[:, :5].sum(-1)
    assert list(sheet.rows) == [
        f"token 1\ntext\n{share[0]:.0%} on text",
        f"token 5\nframe 0\nat (0, 0)\n{share[1]:.0%} on text",
        f"token 28\nframe 1\nat (2, 3)\n{share[2]:.0%} on text",
    ]
    for row, picture in zip(mean[:, 5:].reshape(3, 2, 3, 4).numpy(), sheet.rows.values(), strict=True):
        np.testing.assert_array_equal(picture, heat_maps.colours(row))
    assert "heads 0,2;" in sheet.title


def test_plot_of_a_single_tensor(tmp_path, monkeypatch):
    """Its histogram stands beside its heat map; of many steps some are drawn, evenly spread."""
    tensor = torch.randn(1, 29, 6)
    tensor[0, 3, 2] = torch.nan
    pictures.plot(tmp_path / "x.png", [(tmp_path, dumped(tmp_path, "transformer_blocks.1", tensor))])
    pixels = picture(tmp_path / "x.png")
    assert (pixels == NOT_FINITE).all(axis=-1).any() and pixels[:400, 500:].std() > 20  # text is not in the frames
    drawn = []
    monkeypatch.setattr(pictures, "draw_figure", lambda *arguments: drawn.extend(arguments[2:]))
    pictures.plot(tmp_path / "x.png", [(tmp_path, dumped(tmp_path, "transformer_blocks.1", tensor, steps=20))])
    histograms, sheets, maps = drawn
    assert len(histograms) == len(sheets) == len(maps) == 6 and all(maps)
    assert [sheet.title[5:8] for sheet in sheets] == ["000", "004", "008", "011", "015", "019"]


def test_what_has_no_heat_map(tmp_path):
    """A vector, nothing, and what no file says of where tokens lie."""
    for name, tensor in (("x", torch.zeros(4)), ("y", torch.zeros(0, 3)), ("step_000/z", torch.ones(1, 29, 6))):
        save_file({name: tensor}, tmp_path / f"{name[-1]}.safetensors")
        found = items(tmp_path / f"{name[-1]}.safetensors")
        assert (heat_maps.heat_map(name, found[name]) is None) == (name in "xy")
        assert heat_maps.frames_of_tokens(name, found[name]) is None
        pictures.plot(tmp_path / "x.png", [(tmp_path, found)])
        assert picture(tmp_path / "x.png").std() > 0


@pytest.mark.slow
def test_plot_of_a_run_and_of_two(two_runs, run_stage, tmp_path):
    """The picture is there beside what is printed without it, and the exit status is the comparison's."""
    a, b = two_runs
    plain = run_stage(TOOL, a).stdout
    assert run_stage(TOOL, a, "--plot", "one.png").stdout == f"{plain}wrote one.png\n"
    assert run_stage(TOOL, a, b, "--plot", "both.PNG").stdout
    plain = run_stage(TOOL, a, "--compare", b, "--json", status=1).stdout
    beside = run_stage(TOOL, a, "--compare", b, "--json", "--plot", "two.png", status=1)
    assert (beside.stdout, beside.stderr) == (plain, "wrote two.png\n")
    run_stage(TOOL, a, "--compare", a, "--plot", "equal.png")
    found = {name: picture(tmp_path / name) for name in ("one.png", "both.PNG", "two.png", "equal.png")}
    for name, pixels in found.items():
        assert pixels.shape[1] == 1680 and pixels.shape[0] > 500 and pixels.std() > 20, name
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


def test_too_many_tensors(tmp_path, monkeypatch):
    """The first ones are drawn, or those that differ most, and the title says so."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file({f"blocks.{i}.weight": torch.ones(3) for i in range(30)}, tmp_path / folder / "x.safetensors")
    a, b = items(tmp_path / "a"), items(tmp_path / "b")
    drawn = []
    monkeypatch.setattr(pictures, "draw", lambda *arguments: drawn.append(arguments))
    pictures.plot(tmp_path / "x.png", [(tmp_path / "a", a)])
    assert [entry.name for entry in drawn[0][2]] == list(a)[:24] and "the first 24 of 30" in drawn[0][1]
    for sizes, shown, words in (
        ([i % 7 for i in range(30)], [6] * 4 + [5] * 4 + [4] * 4 + [3] * 4 + [2] * 4 + [1] * 4, "25 of 30 tensors"),
        ([0] * 28 + [1, None], [None, 1], "2 of 30 tensors differ; histograms of 2 of them"),
        ([0] * 30, [0] * 24, "0 of 30 tensors differ; histograms of the first 24"),
    ):
        rows = [{"name": name, "relative": size, "differs": size != 0} for name, size in zip(a, sizes, strict=True)]
        pictures.plot_comparison(tmp_path / "x.png", (tmp_path / "a", a), (tmp_path / "b", b), rows)
        _, title, chosen, *_ = drawn[-1]
        assert [sizes[int(entry.name.split(".")[1])] for entry in chosen] == shown and words in title, title


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("x.safetensors", "--plot", "x.jpg"), "x.jpg is not the name of a picture; it must end in .png"),
        (("x.safetensors", "--plot", ""), "the path is empty"),
        (("x.safetensors", "--plot", "folder.png"), "cannot write folder.png"),
        (("nothing.safetensors", "--plot", "x.png"), "nothing to plot in nothing.safetensors"),
    ],
    ids=["suffix", "empty", "folder", "nothing"],
)
def test_wrong_uses_are_one_line(arguments, words, run_stage, tmp_path):
    save_file({"x": torch.zeros(100)}, tmp_path / "x.safetensors")
    save_file({}, tmp_path / "nothing.safetensors")
    (tmp_path / "folder.png").mkdir()
    process = run_stage(TOOL, *arguments, status=2)
    assert len(process.stderr.splitlines()) == 1 and words in process.stderr, process.stderr
    assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_pictures_of_the_tiny_model(run_stage, tmp_path):
    """The colours of stage 2's latents are those of the video that stage 3 decodes from them."""
    run_stage(STAGE1, "--prompt", ALL[3], "--model_id", TINY_MODEL)
    run_stage(STAGE2, "--height", 64, "--width", 64, "--frames", 17, "--guidance_scale", 2)
    run_stage(STAGE3, "--output_frames", "stage_outputs/frames.safetensors")
    run_stage(TOOL, "stage_outputs", "--plot", "run.png")
    assert picture(tmp_path / "run.png").std() > 20
    latents = items(tmp_path / "stage_outputs")["latents"]
    frames = load_file(tmp_path / "stage_outputs" / "frames.safetensors")["frames"].numpy()
    (colours,) = pictures.sheet_of(Entry("latents", [latents]), [""]).rows.values()
    truth = np.moveaxis(fit_latent_rgb.mean_colours(frames, colours.shape[:3]), 0, -1)
    correlation = np.corrcoef(colours.flatten(), truth.flatten())[0, 1]
    print(f"correlation of the latents' colours with the decoded video's: {correlation:.4f}")
    assert correlation > 0.97, correlation


@pytest.mark.parametrize(("number", "shown"), [(2, [0, 1]), (6, range(6)), (11, range(0, 11, 2))], ids=str)
def test_of_several_videos_the_same_are_shown_in_latents_and_pictures(number, shown, tmp_path):
    """Each with its latents beside its video; in one folder, as of a dump, what is shown is evenly spread."""
    folders = [tmp_path / f"prompt_{n:04}" for n in range(number)]
    tensors = [Entry(f"{folder.name}/latents", [Item(folder / LATENTS, "latents")]) for folder in folders]
    videos = [Entry(f"{folder.name}/video.mp4", [Item(folder / "video.mp4", None)]) for folder in folders]
    chosen, note = pictures.chosen_for_sheets([*tensors, *videos])
    assert chosen == [entry for n in shown for entry in (tensors[n], videos[n])]
    assert ("pictures of 6 of 11 videos" in note) == (number == 11), note
    of_dump = [Entry(f"step_{n:03}/latents", [Item(tmp_path / "dump", f"step_{n:03}/latents")]) for n in range(number)]
    assert pictures.chosen_for_sheets(of_dump)[0] == [of_dump[n] for n in shown]


def test_prompts_stand_in_the_titles_of_pictures(tmp_path):
    """Of latents from the file itself, of an encoded video from the config beside it."""
    save_file({"latents": torch.ones(1, 2, 1, 2, 2)}, tmp_path / LATENTS, {"made_from": '{"prompt": "a red circle"}'})
    entry = Entry("latents", [items(tmp_path)["latents"]])
    assert pictures.sheet_of(entry, [""]).title.startswith("latents of «a red circle»: ")
    video = Entry("video.mp4", [Item(tmp_path / "video.mp4", None)])
    assert pictures.prompt_of(video) == ""
    texts = {"model_id": "m", "prompt": "a blue square", "negative_prompt": ""}
    (tmp_path / CONFIG).write_text(json.dumps(texts))
    assert pictures.prompt_of(video) == " of «a blue square»"
    assert pictures.prompt_of(Entry("both", [*entry.items, *video.items])) == ""
