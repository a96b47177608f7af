"""Writing a checkpoint, from memory or file by file."""
