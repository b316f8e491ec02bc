"""The training script: all its parts on a few batches, and a run that goes on where it was interrupted."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXPipeline

from cogvideox.files.generation_defaults import FILE
from tests.helpers import TINY_MODEL
from tools import train_tiny_model
from tools.moving_shapes import held_out

FEW = ("--effort", "0.002", "--work_dir", "work", "--device", "cpu")


@pytest.mark.slow
def test_all_parts_and_the_folder_that_comes_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_tiny_model.main([*FEW, "--output_dir", "once"])
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()[:-1]] == [
        *("vae_taught", "vae_together", "vae_decoder", "encoding", "transformer")
    ], printed
    pipeline = CogVideoXPipeline.from_pretrained(tmp_path / "once", dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    start = CogVideoXPipeline.from_pretrained(tmp_path / "work" / "untrained", dtype=torch.float32)
    for name in ("text_encoder", "transformer", "vae"):
        pairs = zip(getattr(start, name).parameters(), getattr(pipeline, name).parameters(), strict=True)
        changed = [not torch.equal(before.bfloat16().float(), after) for before, after in pairs]
        assert sum(changed) > 0.5 * len(changed), f"{name}: {sum(changed)} of {len(changed)} parameters were trained"
    assert pipeline.vae.config.scaling_factor != start.vae.config.scaling_factor
    video = pipeline(str(held_out()[0]), height=32, width=32, num_frames=9, num_inference_steps=1, output_type="np")
    assert video.frames.shape == (1, 9, 32, 32, 3)

    said, expected = (json.loads((folder / FILE).read_text()) for folder in (tmp_path / "once", TINY_MODEL))
    assert said == expected

    # Started again it has nothing left to do, and writes the same model.
    train_tiny_model.main([*FEW, "--output_dir", "again"])
    for file in (tmp_path / "once").rglob("*.*"):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(tmp_path / "once")).read_bytes(), file


def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train_tiny_model, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setitem(train_tiny_model.PARTS, "part", train_tiny_model.Part(12, 0.1, "linear", 0.9))

    def train(folder, stop: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        module = torch.nn.ModuleDict({"block": torch.nn.Conv2d(4, 4, 2, padding="same"), "out": torch.nn.Linear(5, 5)})

        def loss(generator, progress):
            if progress * 12 == stop:
                raise KeyboardInterrupt
            x = torch.randn(8, 4, 3, 5) + torch.from_numpy(generator.normal(size=5)).float()
            return (module["out"](module["block"](x)).float() - x).square().mean()

        folder.mkdir(exist_ok=True)
        arguments = SimpleNamespace(work_dir=folder, device="cpu", seed=3, effort=1)
        train_tiny_model.fit("part", {"module": module}, loss, arguments)
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    whole = train(tmp_path / "whole")
    assert torch.equal(train(tmp_path / "whole"), whole)  # started again, with nothing left to do
    for stop in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", stop)
    assert torch.equal(train(tmp_path / "parts"), whole)


@pytest.mark.parametrize("option", [("--effort", "-1"), ("--seed", "1.5"), ("--effort", "much")], ids=str)
def test_wrong_options(option, capsys):
    with pytest.raises(SystemExit):
        train_tiny_model.main(option)
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and option[0] in error
