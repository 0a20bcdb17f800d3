"""Files and folders that appear whole or not at all, are locked while they are written, and show damage."""
