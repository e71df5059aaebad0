"""Programs that a launcher starts by their path."""
