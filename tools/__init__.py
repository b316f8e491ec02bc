"""What makes and trains the tiny model."""
