"""Many conversions measured: runs, grids and files of them, searches and experiments."""
