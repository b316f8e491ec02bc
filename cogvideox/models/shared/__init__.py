"""What transformer and decoder share: sizes, sharding, taps, loading onto the chips."""
