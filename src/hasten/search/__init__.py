"""Search: calibration, plans, and the choice among recipes by measurement."""
