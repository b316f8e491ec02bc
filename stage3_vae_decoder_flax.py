"""Run stage 3 with the Flax decoder: the options, files and output are those of stage3_vae_decoder.py."""

import functools

from cogvideox.cli.program import run
from stage3_vae_decoder import main

if __name__ == "__main__":
    run(functools.partial(main, decoder="flax"))
