"""Measure time and quality of the stages beside the diffusers pipeline; compare predictions with measurements."""

import cogvideox  # noqa: F401  it says in one line that a package is missing
