"""What lies on disk: names, schemas, tensors, atomic writes, provenance, state, checkpoints, LoRAs, dumps."""
