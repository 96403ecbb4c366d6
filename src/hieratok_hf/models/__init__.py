"""Give HieraTok to both libraries, over one core, with its configuration, losses and saved folders."""
