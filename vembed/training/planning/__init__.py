"""What a run will need, from the model's shape and the lengths of the data; no weight is loaded."""
