"""Tasks as values, the loop that trains them, and the folder of a run."""
