"""The engine of the caches: forecasts as linear combinations of earlier outputs, and plans of full steps."""
