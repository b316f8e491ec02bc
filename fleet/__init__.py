"""Make the videos of a prompt file on many machines with Ray: `python -m fleet`; docs/fleet.md says how."""
