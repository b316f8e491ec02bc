"""What inspect_tensors.py and `utils.py status` do: items, comparison, tables, pictures."""
