"""How much each unit of a dimension group is worth keeping, by criteria in a registry, and which units that keeps."""
