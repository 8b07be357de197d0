"""The examples, each run as its user would run it."""
