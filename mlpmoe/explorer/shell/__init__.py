"""The first screen: controls, links, sentence, cards and the three pictures."""
