"""What measures: time and quality of the stages beside the diffusers pipeline, predictions beside measurements."""
