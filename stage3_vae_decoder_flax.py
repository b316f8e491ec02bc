"""Run stage 3 with the Flax decoder: the options, files and output are those of stage3_vae_decoder.py."""

import functools

from cogvideox.cli.program import run
from stage3_vae_decoder import main as main_of_a_decoder

main = functools.partial(main_of_a_decoder, decoder="flax")

if __name__ == "__main__":
    run(main)
