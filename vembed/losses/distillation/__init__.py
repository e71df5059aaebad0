"""What a student is taught by a teacher: its embeddings, their relations, or its scores."""
