"""What a user types and sees: options, report, progress, signals."""
