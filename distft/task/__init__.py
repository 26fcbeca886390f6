"""Tasks: from a document's text to token ids and what of them is a target. Language modelling is the first."""
