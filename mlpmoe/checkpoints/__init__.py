"""Converted models as checkpoints that other software opens. Imports measure, models and core."""
