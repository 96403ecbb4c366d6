"""What each command takes, a function a command that fills its parser; nothing here imports torch."""
