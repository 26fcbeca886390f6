"""Tasks: from a row of text to token ids and what of them is a target."""
