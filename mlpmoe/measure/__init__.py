"""What a conversion costs and buys: parameters, magnitudes, perplexity, text, speed."""
