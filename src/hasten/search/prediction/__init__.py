"""What a prediction is made of: a model without weights, traces of its calls, devices, and a ladder of recipes."""
