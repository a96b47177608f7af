"""What a server holds for its visitors: models, texts, turns."""
