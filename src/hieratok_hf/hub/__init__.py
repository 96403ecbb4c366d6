"""Folders, model cards, code and uploads for the Hugging Face Hub."""
