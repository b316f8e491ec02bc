"""The VAE decoder, through TorchAx or in Flax: layers, the split in space, chunks in time."""
