"""The VAE: its decoder, through TorchAx or in Flax, and its encoder: layers, the split in space, chunks in time."""
