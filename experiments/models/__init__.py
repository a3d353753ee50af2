"""Models that several tasks share: sentence classifiers and recurrent networks."""
