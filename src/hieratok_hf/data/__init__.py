"""Images and latents, from files to batches."""
