"""A teacher's opinion on the training rows: computed once, stored, and read in its place."""
