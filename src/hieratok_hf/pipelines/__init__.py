"""Generate images of classes by a pipeline of diffusers."""
