"""The forms in which a converted model can leave."""
