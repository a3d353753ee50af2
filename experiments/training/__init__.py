"""What a task is, the loop that trains it, and the folder of a run."""
