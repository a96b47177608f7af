"""Tensors in, tensors out: the conversion itself. Imports torch and transformers only."""
