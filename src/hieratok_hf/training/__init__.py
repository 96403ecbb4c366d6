"""Parts of a training loop of a tokenizer or a generator."""
