"""What a training loop of a tokenizer or a generator is made of."""
