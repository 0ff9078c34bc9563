"""Is a converted model what it should be? Its tensors, settings, tokenizer and logits against the model that it was made of."""
