"""What a model costs: parameters, magnitudes, compute, speed."""
