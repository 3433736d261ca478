"""A pruned checkpoint on the Hub: its model card, and the upload."""
