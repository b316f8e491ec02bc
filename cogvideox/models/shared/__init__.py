"""What transformer and VAE share: sizes, sharding, taps, loading onto the chips."""
