"""Opening a checkpoint again, and what is recorded of it."""
