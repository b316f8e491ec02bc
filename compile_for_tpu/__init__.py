"""Compile a stage for a TPU on a machine without one, and predict its time from the compiler's schedule.

The command line is in __main__.py: `python -m compile_for_tpu stage2 --topology v6e-8`.
"""
