"""The core: techniques, recipes, plans, sessions, and the seams through which a pipeline is changed."""
