"""Hyperparameter search as pure functions: what to try next, from which tokens on to compare, what was learnt."""
