"""Figures from plain numbers."""
