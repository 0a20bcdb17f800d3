"""What a model costs on paper: MACs, parameters and bytes, of the whole, of its groups, and of an operation."""
