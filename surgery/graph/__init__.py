"""What is traced: from a model to graphs."""
