"""The class-conditional pipeline of diffusers and its parts."""
