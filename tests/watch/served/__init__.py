"""What the servers of these tests serve."""
