"""Arrays in, arrays out: the transformer, the VAE, and what they share."""
