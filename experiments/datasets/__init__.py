"""Where data sets are and how their text becomes tokens."""
