"""Proof that a job keeps its promises: trained in many ways, and while things are killed."""
