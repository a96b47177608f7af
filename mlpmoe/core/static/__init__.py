"""The static pipeline: order, split, fade, keep, compensate; the same branches for every token."""
