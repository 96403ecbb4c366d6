"""Parts that the command line scripts share."""
