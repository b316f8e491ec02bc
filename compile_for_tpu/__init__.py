"""Compile a stage for a TPU that is not there, and predict from the compiler's schedule how long it will take.

The command line is in __main__.py: `python -m compile_for_tpu stage2 --topology v6e-8`.
"""
