"""The models of both libraries over one core, with their configuration, losses and saved folders."""
