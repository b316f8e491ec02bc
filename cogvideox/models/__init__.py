"""Arrays in, arrays out: the transformer, the decoder, and what they share."""
