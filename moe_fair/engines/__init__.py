"""How a model is run: whole in memory, or one decoder layer at a time."""
