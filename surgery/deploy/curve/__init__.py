"""The speed/accuracy curve: its candidates, how each is trained, scored and timed, and how the result is shown."""
