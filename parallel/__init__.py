"""Where things run: mesh, collectives, expert parallelism, launching. Applied to the model from outside."""
