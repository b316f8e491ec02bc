"""The transformer: attention, blocks, scheduler, one denoising step, and the loop over the steps."""
