"""Files, images and processes; nothing here knows the rest of the package."""
