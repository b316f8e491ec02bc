"""What runs on the devices: arrays in, arrays out, no files and no arguments."""
