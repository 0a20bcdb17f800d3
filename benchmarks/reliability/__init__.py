"""What survives damaged files, killed processes and long chains of edits."""
