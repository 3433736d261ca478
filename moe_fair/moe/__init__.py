"""Experts of a mixture-of-experts language model as units."""
