"""The measurement that judges generated clips, on clips whose caption is known."""

import numpy as np
import pytest

from tools.moving_shapes import (
    ALL,
    BACKGROUNDS,
    CHANCE,
    COLOURS,
    SHAPES,
    Caption,
    agreement,
    held_out,
    measure,
    render,
    trained_on,
)


@pytest.mark.parametrize(
    ("frames", "size", "captions"),
    [(17, 64, ALL), *(pytest.param(*clip, ALL[::5], marks=pytest.mark.slow) for clip in ((9, 64), (33, 96)))],
    ids=["17-64", "9-64", "33-96"],
)
@pytest.mark.parametrize("noise", [pytest.param(0, marks=pytest.mark.slow), 12], ids=lambda noise: f"noise {noise}")
def test_measure_knows_every_caption(noise, frames, size, captions):
    """Clean, and with more noise than a reconstruction of 28 dB has error; in other sizes every word is there."""
    generator = np.random.default_rng(0)
    wrong = []
    for caption in captions:
        clip = render(caption, generator, frames, size)
        assert clip.shape == (frames, size, size, 3) and clip.dtype == np.uint8
        measured = measure(np.clip(clip + generator.normal(0, noise, clip.shape), 0, 255).astype(np.uint8))
        if measured != caption:
            wrong.append((caption, measured))
    assert not wrong, f"{len(wrong)} of {len(captions)}, for example {wrong[0]}"


@pytest.mark.parametrize("shape", SHAPES)
def test_faint_blocks_around_a_shape_do_not_change_it(shape):
    """What a decoder leaves at times: blocks of 8 x 8 pixels around the shape, a little of its colour in them."""
    generator = np.random.default_rng(2)
    wrong = []
    for caption in (caption for caption in ALL if caption.shape == shape):
        clip = render(caption, generator).astype(float)
        inside = np.linalg.norm(clip - clip[:, :1, :1], axis=-1, keepdims=True) > 60
        blocks = generator.random((17, 8, 8, 1)) < 0.3
        faint = 0.35 * np.kron(blocks, np.ones((1, 8, 8, 1))) * ~inside
        clip += faint * (COLOURS[caption.colour] - clip)
        if measure(clip.round().astype(np.uint8)) != caption:
            wrong.append((caption, measure(clip.round().astype(np.uint8))))
    assert not wrong, f"{len(wrong)}, for example {wrong[0]}"


def test_what_is_not_there_is_not_measured():
    empty = np.full((17, 64, 64, 3), BACKGROUNDS["gray"], np.uint8)
    assert measure(empty) == Caption(None, None, None, "gray")
    still = np.repeat(render(ALL[0], np.random.default_rng(0))[:1], 17, axis=0)
    assert measure(still) == ALL[0]._replace(direction=None)
    noise = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3)).astype(np.uint8)
    assert sum(agreement(ALL[0], measure(noise))) <= 2


@pytest.mark.slow
def test_the_measure_of_other_clips_is_chance():
    """Captions that have nothing to do with the clip agree as often as chance says."""
    generator = np.random.default_rng(1)
    shown, expected = generator.permutation(ALL).tolist(), generator.permutation(ALL).tolist()
    scores = np.mean(
        [agreement(Caption(*a), measure(render(Caption(*b), generator))) for a, b in zip(expected, shown, strict=True)],
        axis=0,
    )
    chance = np.array(list(CHANCE.values()))
    spread = np.sqrt(chance * (1 - chance) / len(ALL))
    assert (abs(scores - chance) < 4 * spread).all(), f"{scores} against {chance}"


def test_held_out_captions_share_every_word_with_the_others():
    assert len(ALL) == 216 == len(held_out()) + len(trained_on()) and 20 <= len(held_out()) <= 40
    assert not set(held_out()) & set(trained_on())
    for captions in (trained_on(), held_out()):
        for i, attribute in enumerate(Caption._fields):
            assert len({caption[i] for caption in captions}) == round(1 / CHANCE[attribute])
