"""Models that several tasks share: classic ones, and encoders of sentences."""
