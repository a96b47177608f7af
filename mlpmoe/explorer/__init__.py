"""The page: what it shows comes from plain functions; panels build components and wire events."""
