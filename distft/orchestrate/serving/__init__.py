"""Serving on the cluster: models put up, watched, put in one another's place and taken down."""
