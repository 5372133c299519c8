"""The steps of a recipe, each a function of its configuration, the model in hand and a folder."""
