"""Make, train and judge the tiny model."""

import cogvideox  # noqa: F401  it says in one line that a package is missing
