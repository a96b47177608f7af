"""What a conversion does to a model's words: perplexity, tokens, drift, branches, routing."""
