"""Studies: what happens to branches and experts that are trained, each a question with a table."""
