"""Training on the cluster: one group of workers after the other, and what is done when one fails."""
