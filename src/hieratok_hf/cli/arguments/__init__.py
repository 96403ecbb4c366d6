"""Fill the parser of each command, by a function a command; nothing here imports torch."""
